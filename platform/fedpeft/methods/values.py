"""Round-0 values from a numpy generator, and what all exported configs share; no torch."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.tensors import Entry, Layout

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec

PREFIX = "base_model.model."


def uniform_fan_in(entry: Entry, rng: np.random.Generator) -> NDArray[np.float32]:
    """Kaiming-uniform with a = sqrt(5) over the last axis, ``U(-1/sqrt(in), 1/sqrt(in))``: what peft gives lora_A."""
    bound = 1.0 / sqrt(entry.shape[-1])
    return rng.uniform(-bound, bound, entry.shape).astype(np.float32)


def zeros(entry: Entry) -> NDArray[np.float32]:
    """All zeros."""
    return np.zeros(entry.shape, np.float32)


def normal(entry: Entry, rng: np.random.Generator, deviation: float) -> NDArray[np.float32]:
    """Normal with mean 0."""
    return (rng.standard_normal(entry.shape) * deviation).astype(np.float32)


def head(entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32]:
    """A fresh head: matrices N(0, config.initializer_range), biases 0, norm gains 1."""
    if len(entry.shape) > 1:
        return normal(entry, rng, float(getattr(config, "initializer_range", None) or 0.02))
    return np.full(entry.shape, 0.0 if entry.name.endswith("bias") else 1.0, np.float32)


def modules_of(layout: Layout, tail: str) -> list[str]:
    """Names of the modules whose tensors end in ``tail``, in layout order."""
    return [name.removeprefix(PREFIX).removesuffix(tail) for name in layout.names if name.endswith(tail)]


def head_modules(layout: Layout) -> list[str] | None:
    """The shell's own modules outside the trunk, as peft's ``modules_to_save`` wants them."""
    names = [e.name.removeprefix(PREFIX).removeprefix("base_model.") for e in layout.entries if e.role == "head"]
    return sorted({name.partition(".")[0] for name in names}) or None


def common(base_model: str, head_spec: HeadSpec, layout: Layout) -> dict[str, Any]:
    """The fields that every exported ``adapter_config.json`` has."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "revision": None,
        "task_type": _task_type(head_spec, layout),
    }


def has_two_halves(layout: Layout) -> bool:
    """Whether the tensors are of an encoder and of a decoder."""
    return all(any(f"{half}." in name for name in layout.names) for half in ("encoder", "decoder"))


def _task_type(head_spec: HeadSpec, layout: Layout) -> str:
    if head_spec.kind == "classification":
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if has_two_halves(layout) else "CAUSAL_LM"
