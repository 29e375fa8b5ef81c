"""Which way runs for which shape."""

from __future__ import annotations

from torch import Tensor

from fedpeft.errors import ConfigError
from fedpeft.mixtures.plans import Blend, Pairs, Share
from fedpeft.mixtures.ways import Batched, Grouped, Loop, Segments, Stacked, Way

WAYS = ("auto", "loop", "batched", "segments", "grouped", "stacked")
PAIRED: dict[str, type[Batched] | type[Segments] | type[Grouped]] = {"batched": Batched, "segments": Segments, "grouped": Grouped}


def check_way(name: str) -> str:
    """``name``, if it is a way. Raises `ConfigError` naming the ways."""
    if name not in WAYS:
        raise ConfigError(f"mixture: way {name!r} is unknown; choose one of {list(WAYS)}")
    return name


def way_for(share: Share, name: str) -> tuple[Way, Tensor | None]:
    """The way for a share, and its weights."""
    plan = share.plan
    if name == "loop":
        return Loop(share.matrix), share.matrix
    if isinstance(plan, Blend):
        return Stacked(plan), plan.weights
    kind = PAIRED.get(name) or _usual(plan)
    return kind(plan), plan.weights


def _usual(plan: Pairs) -> type[Batched] | type[Segments] | type[Grouped]:
    if plan.uniform is not None or len(plan.slots) <= plan.capacity:
        return Batched
    return Segments
