"""Drift telemetry: how much of the update factor averaging loses, from a few probe columns (ours).

A site adds P_i = dB_i (dA_i w) for public random signs w to what it sends. With dB, dA the mean deltas, the coordinator knows
C w = mean P_i - dB (dA w) and U w = C w + dB (A w) + B (dA w) + dB (dA w), where C = M - B̄ Ā is the cross term that averaging the
factors loses of the mean product M, and U = M - B A the whole update. E |C w|² = ||C||², so rho² = Σ |C w|² / Σ |U w|² over
modules estimates ||C||² / ||U||². Where training has converged U is small while sites still part, so rho comes near 1.

Both sides draw w from the values that the round starts from; sites need not be named.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fedpeft.factors import Matrix, Pair
from fedpeft.schemes.base import Phase
from fedpeft.schemes.pairing import every_pair, signs
from fedpeft.tensors import Entry, Layout, Tensors

Array = NDArray[np.float32]


def entries(layout: Layout, phase: Phase, count: int) -> list[Entry]:
    """Role ``probe``: (m, ``count``) values per module whose two factors both move; nothing for ``count`` 0."""
    shape = {entry.name: entry.shape for entry in layout.entries}
    moving = every_pair(layout, phase.roles) if count else ()
    return [Entry("probe", f"probe/{pair.b}", (shape[pair.b][0], count)) for pair in moving]


def travels(layout: Layout, phase: Phase, count: int) -> Layout:
    """The phase's roles with the probes."""
    return Layout.of([*layout.subset(phase.roles).entries, *entries(layout, phase, count)])


def probed(before: Tensors, delta: Tensors, phase: Phase, count: int) -> Tensors:
    """Site: ``delta`` of the phase's roles, with its probes beside it."""
    found = Layout.of(entries(before.layout, phase, count))
    if not found.entries:
        return delta
    seed, named, values = before.pick(phase.roles).digest, delta.named(), {}
    for pair in every_pair(before.layout, phase.roles):
        b, a = named[pair.b].astype(np.float64), named[pair.a].astype(np.float64)
        values[f"probe/{pair.b}"] = b @ (a @ columns(seed, pair, a.shape[1], count))
    whole = Tensors.zeros(travels(before.layout, phase, count))
    return whole.patch(delta).patch(Tensors.from_named(found, values))


def rho(current: Tensors, mean: Tensors, phase: Phase, count: int) -> dict[str, float]:
    """Coordinator: ``{"drift": ||C|| / ||U||}`` over all modules; empty without probes or where nothing moved."""
    if "probe" not in mean.layout.roles:
        return {}
    seed, now, moved = current.pick(phase.roles).digest, current.named(), mean.named()
    lost = whole = 0.0
    for pair in every_pair(current.layout, phase.roles):
        w = columns(seed, pair, now[pair.a].shape[1], count)
        cross, update = _seen(now, moved, pair, w)
        lost, whole = lost + float(np.sum(cross**2)), whole + float(np.sum(update**2))
    return {"drift": sqrt(lost / whole)} if whole > 0.0 else {}


def columns(seed: str, pair: Pair, width: int, count: int) -> Matrix:
    """Signs over the root of ``width``, so that a probe is no larger than the update it looks at."""
    return signs(f"probe {seed} {pair.b}", (width, count)) / sqrt(width)


def _seen(now: Mapping[str, Array], moved: Mapping[str, Array], pair: Pair, w: Matrix) -> tuple[Matrix, Matrix]:
    """(C w, U w) of one module."""
    b, a, db, da = (values[name].astype(np.float64) for values in (now, moved) for name in (pair.b, pair.a))
    both = db @ (da @ w)
    cross = moved[f"probe/{pair.b}"] - both
    return cross, cross + db @ (a @ w) + b @ (da @ w) + both
