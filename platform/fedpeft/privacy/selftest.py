"""Whether what is about to be released is what was promised: tensors moved, the norm bounded, the noise there and of its size.

Elsewhere training under differential privacy was seen to fail silently: frozen tensors, noise left out, noise of another scale.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import sqrt

import numpy as np

from fedpeft.errors import PrivacyError
from fedpeft.privacy.clipping import Values, norm
from fedpeft.privacy.mechanism import Mechanism, Released, protect, release
from fedpeft.privacy.noise import SecureNoise
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Update

DOUBT = 7.0
"""Standard errors: a sound mechanism fails one check in 10^11."""
SITES = 5
MOST = 4096
"""Values of `sample`: enough to tell noise of another size, cheap before every round."""
SMALLEST = 64
"""Values below which a vector is repeated until noise can be told from its absence."""


@dataclass(frozen=True)
class Findings:
    """What the self-test measured: noise deviation over the promised one, largest norm over the sensitivity, values looked at."""

    noise: float
    norm: float
    values: int


def check_moved(before: Tensors, after: Tensors, roles: Collection[str]) -> None:
    """Refuse an update of which a trained tensor did not move at all.

    Raises:
        PrivacyError: a tensor of ``roles`` is bit for bit what it was, or is not finite; all are named.
    """
    old, new = before.named(), after.named()
    trained = [entry.name for entry in before.layout.entries if entry.role in roles]
    still = [name for name in trained if np.array_equal(old[name], new[name])]
    broken = [name for name in trained if not np.isfinite(new[name]).all()]
    if still or broken or not trained:
        raise PrivacyError(
            f"self-test: of {len(trained)} trained tensors {still[:4]} did not move and {broken[:4]} are not finite; "
            "check that gradients reach them and that the optimizer holds them"
        )


def self_test(mechanism: Mechanism, layout: Layout, source: SecureNoise) -> Findings:
    """Run ``mechanism`` on made-up deltas of ``layout`` and compare what it releases with what clip and noise say.

    Half the deltas are far beyond the clip, half far below, so that scaling where nothing is to be scaled shows as well.

    Raises:
        PrivacyError: a site's vector is too long, or the released mean is off by more or less than the noise promised.
    """
    count = min(mechanism.sites, max(SITES, mechanism.shares))
    parts = [_delta(layout, mechanism.clip * (30 if site % 2 else 0.3), site) for site in range(count)]
    meant = np.sum([_clipped(part, mechanism.clip) for part in parts], axis=0)
    counters = {name: (0.0,) * one.length for name, one in mechanism.counters.items()}
    residues, longest = [], 0.0
    for _ in range(max(1, SMALLEST // max(layout.size, 1))):
        updates = [protect(part, counters, mechanism, source) for part in parts]
        released = release(sum(updates[1:], start=updates[0]), mechanism, source)
        divisor = mechanism.rate * mechanism.sites if mechanism.rate < 1 else count
        residues.append(released.mean.flat.astype(np.float64) * divisor - meant)
        longest = max(longest, *(_length(update, mechanism) for update in updates))
    return _judged(np.concatenate(residues), mechanism, count, longest)


def sample(layout: Layout) -> Layout:
    """As many values as ``layout`` has, or as many as tell: what `self_test` says of a mechanism depends on no more."""
    return Layout.of([Entry("B", "self-test", (min(layout.size, MOST),))])


def check_release(total: Update, released: Released, mechanism: Mechanism) -> None:
    """Compare what is about to be released with the sum that it was made of: noise of the promised size, or none where sites added it.

    Raises:
        PrivacyError: the difference is not the coordinator's noise; nothing may be released.
    """
    count = mechanism.rate * mechanism.sites if mechanism.rate < 1 else total.count
    values = total.codes[: released.mean.layout.size].astype(np.float64) * total.grid.step
    residue = released.mean.flat.astype(np.float64) * count - values
    size, promised = max(len(residue), 1), 0.0 if mechanism.shares else mechanism.deviation
    found = float(np.sqrt(np.sum(residue**2) / size))
    slack = promised * DOUBT / sqrt(2 * size) + 1e-3 * promised + 1e-6 * float(np.abs(values).max(initial=0.0))
    if abs(found - promised * bool(len(residue))) > slack:
        raise PrivacyError(
            f"self-test: what would be released differs by {found:.3g} from the sum, {promised:.3g} was promised; nothing is released: "
            "report this"
        )


def _judged(residue: Values, mechanism: Mechanism, count: int, longest: float) -> Findings:
    promised = mechanism.own * sqrt(count) if mechanism.shares else mechanism.deviation
    found = float(np.sqrt(np.mean(residue**2))) / promised
    findings = Findings(found, longest, len(residue))
    shift = abs(float(residue.mean())) / promised * sqrt(len(residue))
    if abs(found - 1) > DOUBT / sqrt(2 * len(residue)) + 1e-3 or shift > DOUBT or longest > 1:
        raise PrivacyError(
            f"self-test: noise {found:.3g} times what was promised, its mean {shift:.2g} standard errors from 0, largest norm "
            f"{longest:.6g} of the sensitivity; nothing may be released: report this"
        )
    return findings


def _length(update: Update, mechanism: Mechanism) -> float:
    """A site's norm over the sensitivity; with its own noise in it there is nothing to measure."""
    return 0.0 if mechanism.shares else norm(update.codes.astype(np.float64) * update.grid.step) / mechanism.sensitivity


def _delta(layout: Layout, size: float, seed: int) -> Tensors:
    """Made-up values of norm ``size``; they are no noise, and need not be secret."""
    flat = np.cos(np.arange(1, layout.size + 1, dtype=np.float64) * (seed + 1))
    return Tensors(layout, (flat * (size / max(norm(flat), 1e-30))).astype(np.float32))


def _clipped(delta: Tensors, clip: float) -> Values:
    """Clipping once more, by another route than the mechanism's."""
    length = sqrt(sum(float(value) ** 2 for value in delta.flat))
    return delta.flat.astype(np.float64) / max(1.0, length / clip)
