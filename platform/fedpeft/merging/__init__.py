"""Several adapters of one base made one (see README.md); no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpeft.adapters.spec import Adapter
from fedpeft.config import build
from fedpeft.errors import ConfigError
from fedpeft.merging.applying import merged
from fedpeft.merging.arithmetic import Arithmetic, Svd
from fedpeft.merging.base import Merged, Rule
from fedpeft.merging.dare import Dare
from fedpeft.merging.knots import Knots
from fedpeft.merging.stacking import Cat
from fedpeft.merging.ties import FourSums, Ties, ties_four_sums, trim

MERGES: dict[str, type[Rule]] = {"arithmetic": Arithmetic, "cat": Cat, "dare": Dare, "knots": Knots, "svd": Svd, "ties": Ties}
REFUSED = {
    kind: f"{kind} adds up A and B apart, so products of one adapter's B with another's A come in; use {instead}"
    for kind, instead in {"linear": "cat, svd or arithmetic", "dare_linear": "dare", "dare_ties": "dare or ties"}.items()
}
"""Names from peft's add_weighted_adapter that are not offered, and why."""

__all__ = ["MERGES", "REFUSED", "FourSums", "Merged", "Rule", "make_rule", "merge", "merged", "ties_four_sums", "trim"]


def make_rule(value: str | Mapping[str, Any]) -> Rule:
    """The rule of a name or of a table ``{"kind": ..., settings}``. Raises `ConfigError` naming what is known, or why it is refused."""
    kind = value if isinstance(value, str) else value.get("kind")
    if kind in REFUSED:
        raise ConfigError(f"merge: {REFUSED[str(kind)]}")
    try:
        return build(MERGES, value, "merge")
    except ValueError as fault:
        raise ConfigError(str(fault)) from None


def merge(adapters: Sequence[Adapter], weights: Sequence[float], how: Rule, *, origin: Adapter | None = None, task: str = "") -> Adapter:
    """`merged` without what was lost."""
    return merged(adapters, weights, how, origin=origin, task=task).adapter
