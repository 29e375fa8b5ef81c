"""A task's model around the shared trunk: only the head is new."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from fedpeft.bases.base import Base
from fedpeft.bases.quiet import quiet_transformers
from fedpeft.bases.roles import head_modules
from fedpeft.bases.spec import CLASSIFIERS, HeadSpec
from fedpeft.errors import BaseError

# What peft asks a model in order to choose its quantized layers.
MARKS = ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method")


def shell(base: Base, head: HeadSpec) -> nn.Module:
    """The model for ``head`` on ``base.trunk``. Raises `BaseError` when the base's family has no such head."""
    if head.kind == "classification":
        return _classifier(base, len(head.labels))
    if base.family in CLASSIFIERS:
        raise BaseError(
            f"base {base.spec.model}: an encoder generates no text; use a causal model or an encoder-decoder, or classification"
        )
    return base.model


def _classifier(base: Base, labels: int) -> nn.Module:
    """Built on the meta device, so that nothing of the trunk is ever allocated twice."""
    if base.family == "seq2seq":
        _require_end(base)
    config = copy.deepcopy(base.config)
    config.quantization_config = None
    config.num_labels, config.problem_type = labels, "single_label_classification"
    try:
        with quiet_transformers(), torch.device("meta"):
            form = AutoModelForImageClassification if base.family == "vision" else AutoModelForSequenceClassification
            model: Any = form.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except ValueError:
        raise BaseError(f"base {base.spec.model}: {type(config).__name__} has no classification form; use it for generation") from None
    _share(base, model)
    if base.device != "meta":
        for name in head_modules(model):
            _materialise(model, name, base)
    frozen: nn.Module = model.requires_grad_(False).eval()
    return frozen


def _require_end(base: Base) -> None:
    """An encoder-decoder's classifier pools where the end token stands. Raises `BaseError` when it cannot be told from padding."""
    end, pad = base.config.eos_token_id, base.config.pad_token_id
    if not isinstance(end, int) or end == pad:
        raise BaseError(
            f"base {base.spec.model}: its classifier reads where the end token stands, and eos_token_id is {end}, pad_token_id {pad}; "
            "give it one end token that is not the padding token, or use a generation or choice task"
        )


def _share(base: Base, model: Any) -> None:
    own = getattr(model, model.base_model_prefix, None)
    if type(own) is not type(base.trunk):
        raise BaseError(
            f"base {base.spec.model}: the trunk of {type(model).__name__} is no {type(base.trunk).__name__}; use another architecture"
        )
    setattr(model, model.base_model_prefix, base.trunk)
    for mark in MARKS:
        if hasattr(base.model, mark):
            setattr(model, mark, getattr(base.model, mark))


def _materialise(model: Any, name: str, base: Base) -> None:
    """Give the head memory and the architecture's own initial values, drawn from a fixed seed, in fp32."""
    child = model.get_submodule(name)
    if any(True for _ in child.buffers()):
        raise BaseError(f"base {base.spec.model}: the head {name!r} of {type(model).__name__} keeps buffers; use another architecture")
    child.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        child.apply(model._init_weights)
    child.to(base.device)
    if next(base.trunk.parameters()).dtype != torch.float32:
        child.register_forward_pre_hook(_widen)


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The trunk may answer in half precision; the head computes in fp32."""
    return tuple(value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in inputs)
