"""Bounding what one site can say: the joint norm of its vector, rounding included, and the norm that fits most sites."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, isfinite

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError

Values = NDArray[np.float64]

MARGIN = 1e-9
"""More than summing squares in float64 can be wrong, relatively."""
FIRST = 1e-7
"""What a fine grid adds to the norm at most, as a rule, so that the first try is the last."""
TRIES = 40
STEEPEST = 1e6
"""How far adaptive clipping may go from where it started, as a factor."""


def norm(values: NDArray[np.float32] | Values) -> float:
    """The Euclidean norm of all values together, in float64. Raises `PrivacyError` when it is not finite."""
    wide = values.astype(np.float64, copy=False)
    size = float(np.sqrt(np.dot(wide, wide)))
    if not isfinite(size):
        raise PrivacyError("clipping: the delta is not finite; lower the learning rate or clip gradients")
    return size


def clipped(values: NDArray[np.float32] | Values, bound: float) -> Values:
    """``values`` scaled down to norm ``bound`` where it is larger, else as they are; a zero delta stays zero.

    McMahan et al. 2018 (arXiv 1710.06963), flat clipping. Raises `PrivacyError` when a value is not finite.
    """
    size = norm(values)
    return values.astype(np.float64) * min(1.0, bound / size if size else 1.0)


def bounded(values: Values, bound: float, rounding: Callable[[Values], Values]) -> Values:
    """What ``rounding`` makes of ``values``, scaled down until what leaves has a norm of at most ``bound``.

    ``rounding`` returns the values that the other side will read. Raises `PrivacyError` when it stays beyond the bound.
    """
    limit = bound * (1 - MARGIN)
    scale = min(1.0, limit * (1 - FIRST) / max(norm(values), limit * 1e-9))
    for attempt in range(TRIES):
        made = rounding(values * scale)
        size = norm(made)
        if size <= limit:
            return made
        scale *= min(limit / size, 1.0) * (1 - min(MARGIN * 2**attempt, 0.5))  # a step too small to change what is rounded must grow
    raise PrivacyError(f"clipping: the rounded delta stays above norm {bound:g}; use a finer codec or grid")


def moved(clip: float, inside: float, quantile: float, pace: float, start: float) -> float:
    """The next clipping norm: up where fewer than ``quantile`` of the sites were ``inside`` the norm, down where more were.

    Andrew et al. 2021 (arXiv 1905.03871), geometric update; ``inside`` is the noised share, ``start`` the first norm.
    """
    towards = clip * exp(-pace * (min(max(inside, 0.0), 1.0) - quantile))
    return min(max(towards, start / STEEPEST), start * STEEPEST)
