"""Where sparse deltas lie: drawn from a seed, or given by scores that the coordinator has computed once; no torch.

Positions from data are set before the first round and travel with it, as tensors of role ``index`` that no scheme moves. Scores
add up over sites, so sums of squared gradients may come out of a secure sum as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError
from fedpeft.methods.values import PREFIX
from fedpeft.tensors import Entry, Layout, Tensors

TAIL = ".sparse.index"


def place(tensors: Tensors, scores: Mapping[str, NDArray[np.floating]]) -> Tensors:
    """``tensors`` of a sparse method with its positions at the highest ``scores`` of each weight, and all deltas 0.

    ``scores`` maps module names to arrays (out, in), as `fedpeft.methods.own.scores` makes them.

    Raises:
        AdapterError: a weight has no scores, or they are of another shape or not finite.
    """
    named = {name: values.copy() for name, values in tensors.named().items()}
    indices = [entry for entry in tensors.layout.entries if entry.role == "index"]
    if not indices:
        raise AdapterError("sparse: this adapter has no positions to place; use method sparse-fisher, sparse-lottery or sparse-magnitude")
    for entry in indices:
        named[entry.name][...] = _highest(entry, scores)
        named[entry.name.removesuffix("index") + "delta"][...] = 0.0
    return Tensors.from_named(tensors.layout, named)


def modules(layout: Layout) -> tuple[str, ...]:
    """Names of the weights whose positions ``layout`` holds."""
    return tuple(_module(entry) for entry in layout.entries if entry.role == "index")


def count(size: int, density: float) -> int:
    """How many positions ``density`` means in a weight of ``size`` values: at least one."""
    return max(1, round(density * size))


def spread(seed: int, k: int, size: int) -> NDArray[np.int64]:
    """``k`` different positions below ``size``, ascending; the same for all versions of numpy, whose raw bits are a promise."""
    bits, found = np.random.PCG64(seed), np.zeros(0, np.int64)
    while len(found) < k:
        drawn = np.concatenate((found, (bits.random_raw(2 * k) % np.uint64(size)).astype(np.int64)))
        found = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return np.sort(found[:k])


def _highest(entry: Entry, scores: Mapping[str, NDArray[np.floating]]) -> NDArray[np.int64]:
    module, k = _module(entry), entry.shape[1]
    found = scores.get(module)
    if found is None or found.ndim != 2 or found.size < k or not np.isfinite(found).all():
        have = "none" if found is None else f"{list(found.shape)}, finite: {bool(np.isfinite(found).all())}"
        raise AdapterError(f"sparse: {module} needs finite scores (out, in), has {have}; compute them for the adapter's own targets")
    flat = np.sort(np.argpartition(found, found.size - k, axis=None)[found.size - k :])
    return np.stack(np.divmod(flat, found.shape[1]))


def _module(entry: Entry) -> str:
    return entry.name.removeprefix(PREFIX).removesuffix(TAIL)
