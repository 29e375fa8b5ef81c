"""Drift telemetry: how much of the update factor averaging loses, from a few probes of it (ours).

A site adds P_i = S dB_i dA_i w to what it sends, for public random signs w (n, q) and S (s, m). With dB, dA the mean deltas, the
coordinator knows S C w = mean P_i - S dB dA w and S U w = S (C + dB A + B dA + dB dA) w, where C = M - B̄ Ā is the cross term that
averaging the factors loses of the mean product M, and U = M - B A the whole update. E |S C w|² = ||C||² up to the scale of S and w, so
rho² = Σ |S C w|² / Σ |S U w|² over modules estimates ||C||² / ||U||². Where training has converged U is small while sites still
part, so rho comes near 1.

Both sides draw the signs from the values that the round starts from; sites need not be named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fedpeft.factors import Factor, Matrix, Pair
from fedpeft.schemes.base import Phase
from fedpeft.schemes.pairing import every_pair, signs
from fedpeft.tensors import Entry, Layout, Tensors

ROWS = 64
"""A probe has at most so many rows: taller modules are summed into them with random signs."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Probe:
    """What is seen of one module's X (m, n): ``left`` X ``right``, of shape (s, q); about as large as the entries of X."""

    left: Matrix
    right: Matrix

    @staticmethod
    def of(seed: str, pair: Pair, shape: tuple[int, int], count: int) -> Probe:
        """The probe that everyone has who knows ``seed``."""
        m, n = shape
        left = np.eye(m) if m <= ROWS else signs(f"rows {seed} {pair.b}", (ROWS, m)) / sqrt(ROWS)
        return Probe(left, signs(f"columns {seed} {pair.b}", (n, count)) / sqrt(n))

    def __call__(self, x: tuple[Factor, Factor]) -> Matrix:
        """Of X = b a, from its factors (m, r) and (r, n)."""
        return np.asarray((self.left @ x[0]) @ (x[1] @ self.right), np.float64)


def entries(layout: Layout, phase: Phase, count: int) -> list[Entry]:
    """Role ``probe``: (s, ``count``) values per module whose two factors both move; nothing for ``count`` 0."""
    shape = {entry.name: entry.shape for entry in layout.entries}
    moving = every_pair(layout, phase.roles) if count else ()
    return [Entry("probe", f"probe/{pair.b}", (min(shape[pair.b][0], ROWS), count)) for pair in moving]


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
        values[f"probe/{pair.b}"] = Probe.of(seed, pair, (len(b), a.shape[1]), count)((b, a))
    whole = Tensors.zeros(travels(before.layout, phase, count))
    return whole.patch(delta).patch(Tensors.from_named(found, values))


def rho(current: Tensors, mean: Tensors, phase: Phase, count: int) -> dict[str, float]:
    """Coordinator: ``{"drift": ||C|| / ||U||}`` over all modules; empty without probes or where nothing moved."""
    if "probe" not in mean.layout.roles:
        return {}
    seed, now, moved = current.pick(phase.roles).digest, current.named(), mean.named()
    lost = whole = 0.0
    for pair in every_pair(current.layout, phase.roles):
        probe = Probe.of(seed, pair, (len(now[pair.b]), now[pair.a].shape[1]), count)
        cross, update = _seen(now, moved, pair, probe)
        lost, whole = lost + float(np.sum(cross**2)), whole + float(np.sum(update**2))
    return {"drift": sqrt(lost / whole)} if whole > 0.0 else {}


def _seen(now: Mapping[str, Array], moved: Mapping[str, Array], pair: Pair, probe: Probe) -> tuple[Matrix, Matrix]:
    """What the probe sees of C and of U."""
    b, a, db, da = (values[name].astype(np.float64) for values in (now, moved) for name in (pair.b, pair.a))
    both = probe((db, da))
    cross = moved[f"probe/{pair.b}"] - both
    return cross, cross + probe((db, a)) + probe((b, da)) + both
