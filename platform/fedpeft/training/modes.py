"""Which modules behave as in training: the adapter's own always, the frozen model's only when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fedpeft.errors import UpdateError
from fedpeft.tasks.chunked import whole_logits
from fedpeft.tasks.likelihood import padding
from fedpeft.training.kernels import fused_kernels, tensor_cores
from fedpeft.training.offload import checkpointer
from fedpeft.training.packed import by_sequence
from fedpeft.training.settings import TrainSettings

NAMES = ("activation", "gradient")
"""What transformers calls its switch, newest name first."""
KIND = next(name for name in NAMES if hasattr(PreTrainedModel, f"{name}_checkpointing_enable"))
ENABLE, DISABLE = f"{KIND}_checkpointing_enable", f"{KIND}_checkpointing_disable"


@contextmanager
def training(model: nn.Module, settings: TrainSettings) -> Iterator[None]:
    """Training mode of the adapter's layers, of the whole model with ``base_dropout``, and the levers of memory and speed asked for.

    Raises:
        UpdateError: the model cannot checkpoint activations.
    """
    with ExitStack() as stack:
        for lever in (_restored(model), by_sequence(model), padding(not settings.packing), whole_logits(not settings.chunked_loss)):
            stack.enter_context(lever)
        stack.enter_context(_checkpointing(model, settings))
        stack.enter_context(fused_kernels(model, settings.fused_kernels))
        stack.enter_context(tensor_cores(settings.precision != "fp32"))
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
    """Set the layers that wrap a frozen ``base_layer`` (peft's form, and ours) or host a ``mixture`` to training, frozen layers inside not.

    transformers checkpoints only layers whose own flag says training (`_still`); the flag of their children (dropout) stays off.
    """
    for module in list(model.modules()):
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            module.train()
            module.get_submodule("base_layer").eval()
        elif isinstance(getattr(module, "mixture", None), nn.Module) or (checkpointing and isinstance(module, GradientCheckpointingLayer)):
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
def _checkpointing(model: nn.Module, settings: TrainSettings) -> Iterator[None]:
    """Activation checkpointing (non-reentrant) where transformers' switch puts it, with our function, which can offload."""
    if not settings.checkpoint_activations:
        yield
        return
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or not inner.supports_gradient_checkpointing:
        raise UpdateError(f"training.checkpoint_activations: {type(model).__name__} cannot checkpoint activations; set it to false")
    outer: Any = next(module for module in model.modules() if hasattr(module, ENABLE))
    getattr(outer, ENABLE)({"use_reentrant": False})  # a wrapper may have to refuse
    run = checkpointer(settings.offload_activations)
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            own = run if settings.base_dropout else partial(_still, run, module)
            object.__setattr__(module, "_gradient_checkpointing_func", own)
    try:
        yield
    finally:
        getattr(inner, DISABLE)()


def _still(run: Callable[..., Any], layer: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    """Checkpoint a layer that must seem to train, while its forward sees that it does not: BART's and OPT's drop out by their own flag."""

    def still(*inputs: Any) -> Any:
        layer.training = False
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return run(still, *inputs)
