"""Exact merges of methods whose weights are no sum: bottlenecks by hidden units, prompts and prefixes by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.spec import Adapter
from fedpeft.errors import AdapterError

Named = dict[str, NDArray[Any]]
UNITS = frozenset({"down", "up"})


def stacked_units(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[Named, dict[str, int]]:
    """Hidden units side by side, ``w_i`` on ``up``: every bottleneck answers with ``Σ w_i`` of the answers to its input, exactly.

    Tensors by name without the head, and the setting that changes. Raises `AdapterError` when modules or widths differ.
    """
    named = [adapter.tensors.named() for adapter in adapters]
    out: Named = {}
    for entry in adapters[0].spec.layout.subset(UNITS).entries:
        values = [_tensor(adapter, tensors, entry.name) for adapter, tensors in zip(adapters, named, strict=True)]
        if entry.role == "down":
            out[entry.name] = np.concatenate(values, axis=0)
        elif len(entry.shape) == 2:
            out[entry.name] = np.concatenate([value * np.float32(w) for w, value in zip(weights, values, strict=True)], axis=1)
        else:
            out[entry.name] = _sum(weights, values)
    return out, {"dim": sum(_setting(adapter, "dim") for adapter in adapters)}


def concatenated_tokens(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[Named, dict[str, int]]:
    """All virtual tokens one after the other: attention over the union of keys and values.

    A head then answers with the mean of what it answers over each set, in shares that the attention scores themselves decide. A
    weight would be a bias on those scores, log w_i, which no embedding holds, so weights must be equal.

    Raises:
        AdapterError: weights differ, or the adapter holds more than one block of tokens.
    """
    if len(set(weights)) > 1:
        raise AdapterError(f"merge cat: prompts take no weights, got {list(weights)}; give equal ones, or serve the adapters in a mixture")
    out: Named = {}
    for entry in adapters[0].spec.layout.subset(adapters[0].spec.layout.roles - {"head"}).entries:
        values = [_tensor(adapter, adapter.tensors.named(), entry.name) for adapter in adapters]
        if any(len(value) != _setting(adapter, "tokens") for adapter, value in zip(adapters, values, strict=True)):
            raise AdapterError(f"merge cat: {entry.name} {list(entry.shape)} is no block of tokens; serve the adapters in a mixture")
        out[entry.name] = np.concatenate(values, axis=0)
    return out, {"tokens": sum(_setting(adapter, "tokens") for adapter in adapters)}


def _tensor(adapter: Adapter, named: Named, name: str) -> NDArray[Any]:
    if name not in named:
        raise AdapterError(f"merge: {adapter.spec.task} has no {name}; merge adapters with the same targets")
    return named[name]


def _setting(adapter: Adapter, name: str) -> int:
    if not hasattr(adapter.spec.method, name):
        raise AdapterError(f"merge cat: {adapter.spec.method.kind} has no setting {name!r} to enlarge; serve the adapters in a mixture")
    return int(getattr(adapter.spec.method, name))


def _sum(weights: Sequence[float], values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.asarray(sum(w * value.astype(np.float64) for w, value in zip(weights, values, strict=True)), np.float32)
