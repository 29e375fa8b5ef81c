"""Which modules behave as in training: the adapter's own always, the frozen model's only when asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fedpeft.errors import UpdateError
from fedpeft.training.packed import by_sequence
from fedpeft.training.settings import TrainSettings


@contextmanager
def training(model: nn.Module, settings: TrainSettings) -> Iterator[None]:
    """Training mode of the adapter's layers, of the whole model with ``base_dropout``, and checkpointing where asked.

    Raises:
        UpdateError: the model cannot checkpoint activations.
    """
    with _restored(model), by_sequence(model), _checkpointing(model, settings.checkpoint_activations):
        model.train(settings.base_dropout)
        if not settings.base_dropout:
            _wake(model, settings.checkpoint_activations)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode of all modules."""
    with _restored(model), by_sequence(model):
        model.eval()
        yield


def _wake(model: nn.Module, checkpointing: bool) -> None:
    """Set the layers that wrap a frozen ``base_layer`` (peft's form, and ours) to training, the frozen layer inside not.

    transformers checkpoints only layers whose own flag says training; the flag of their children (dropout) stays off.
    """
    for module in list(model.modules()):
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            module.train()
            module.get_submodule("base_layer").eval()
        elif checkpointing and isinstance(module, GradientCheckpointingLayer):
            module.training = True


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put every module's training flag back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Activation checkpointing (non-reentrant) through transformers' switch."""
    if not wanted:
        yield
        return
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or not inner.supports_gradient_checkpointing:
        raise UpdateError(f"training.checkpoint_activations: {type(model).__name__} cannot checkpoint activations; set it to false")
    outer: Any = next(module for module in model.modules() if hasattr(module, "activation_checkpointing_enable"))
    outer.activation_checkpointing_enable({"use_reentrant": False})  # a wrapper may have to refuse
    try:
        yield
    finally:
        inner.activation_checkpointing_disable()
