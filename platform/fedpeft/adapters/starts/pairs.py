"""Factors of every layer put into an adapter, and taken back by its second pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.spec import Adapter, AdapterSpec, entry_seed
from fedpeft.adapters.starts.algebra import Factors
from fedpeft.errors import AdapterError
from fedpeft.methods.lora import Lora
from fedpeft.methods.values import PREFIX, modules_of
from fedpeft.tensors import Tensors

if TYPE_CHECKING:
    from fedpeft.bases import Base

Factor = Callable[[str, NDArray[np.float32], np.random.Generator], Factors]


def modules(spec: AdapterSpec) -> Sequence[str]:
    """The layers that carry a LoRA pair."""
    return modules_of(spec.layout, ".lora_A.weight")


def lora_of(kind: str, spec: AdapterSpec) -> Lora:
    """The method of ``spec``. Raises `AdapterError` unless it is a plain LoRA."""
    if not isinstance(spec.method, Lora) or spec.method.dora:
        raise AdapterError(f"start {kind}: is for a LoRA without DoRA, {spec.task} has method {spec.method.kind}; change method or start")
    return spec.method


def put(base: Base, spec: AdapterSpec, seed: int, kind: str, factor: Factor) -> Adapter:
    """Round 0 with ``factor`` of each layer's weight (out, in) as its first pair, and its negative as the held second pair.

    So the model answers as the base does, whatever base the site holds, and the base is not touched (a start that rewrites weights,
    as published, would need every site to rewrite its own in the same way, which a quantized one cannot).

    Raises:
        AdapterError: the method is no plain LoRA with a held second pair of at least its rank, or the base has no weights.
    """
    method = lora_of(kind, spec)
    if not method.held or method.extra < method.r:
        raise AdapterError(
            f"start {kind}: B A starts as a part of the weights, and a second pair has to take it back: "
            f"set method.extra = {method.r} and method.held = true (they are {method.extra} and {method.held})"
        )
    return placed(base, spec, seed, kind, factor)


def placed(base: Base, spec: AdapterSpec, seed: int, kind: str, factor: Factor) -> Adapter:
    """Round 0 with ``factor`` of each layer's weight as its first pair; a held second pair takes it back, where there is one.

    Raises:
        AdapterError: the method is no plain LoRA, a layer is narrower than its rank, or the base has no weights.
    """
    method, weights = lora_of(kind, spec), weights_of(base, spec, kind)
    named = _fresh(base, spec, seed)
    for module in modules(spec):
        weight = weights(module)
        if min(weight.shape) < method.r:
            raise AdapterError(f"start {kind}: {module} is {list(weight.shape)}, narrower than r = {method.r}; lower method.r")
        write(named, module, factor(module, weight, np.random.default_rng(entry_seed(seed, f"{kind}:{module}"))), method)
    return Adapter(spec, Tensors.from_named(spec.layout, named))


def write(named: dict[str, NDArray[np.float32]], module: str, factors: Factors, method: Lora) -> None:
    """Set one layer's pair, and minus the same in its held pair, in float32 bits that cancel."""
    b, a = (np.asarray(part, np.float32) for part in factors)
    named[f"{PREFIX}{module}.lora_B.weight"][...], named[f"{PREFIX}{module}.lora_A.weight"][...] = b, a
    if method.held and method.extra:
        second_b, second_a = named[f"{PREFIX}{module}.lora_B2.weight"], named[f"{PREFIX}{module}.lora_A2.weight"]
        second_b[...], second_a[...] = 0.0, 0.0
        second_b[:, : method.r], second_a[: method.r] = -b, a


def weights_of(base: Base, spec: AdapterSpec, kind: str) -> Callable[[str], NDArray[np.float32]]:
    """Module -> its weight (out, in), dequantized if need be. Raises `AdapterError` for a base without weights."""
    from fedpeft.adapters.making import check_base
    from fedpeft.methods.own.deltas import weight_of

    check_base(base, spec)
    if base.device == "meta":
        raise AdapterError(f"start {kind}: needs the weights of base {base.spec.model}; use load_base, not meta_base")
    shell: Any = base.shell(spec.head)
    return lambda module: np.asarray(weight_of(shell.get_submodule(module)).cpu().numpy(), np.float32)


def _fresh(base: Base, spec: AdapterSpec, seed: int) -> dict[str, NDArray[np.float32]]:
    from fedpeft.adapters.making import initial

    return initial(base, spec, seed).tensors.named()
