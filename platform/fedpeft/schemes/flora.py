"""The sites' products stacked into a fold, and fresh factors in every round (FLoRA, Wang et al. 2024, arXiv 2409.05976)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedpeft.factors import Factor, share_lost, truncate
from fedpeft.schemes import gathering
from fedpeft.schemes.base import Part, Phase, SiteContext, difference
from fedpeft.schemes.fedex import FIX
from fedpeft.schemes.optimizers import ServerOptimizer, State
from fedpeft.schemes.pairing import require
from fedpeft.schemes.slots import Mask, Slots
from fedpeft.tensors import Layout, Tensors


@dataclass(frozen=True)
class FLoRA:
    """The fold B2 A2 takes in Σ p_i B_i A_i by stacking; then A is drawn anew and B is zero, so the next round starts from the fold.

    The paper merges the stack, of rank Σ r_i, into the base's weights in every round; here it goes to a pair of rank ``method.extra``,
    truncated to its best approximation once it is full. ``seed`` and the round's start give the fresh A, as peft draws it. Starting anew
    in every round learns slowly (FedEx-LoRA, table 4): prefer `FedEx` or `FlexLoRA`. A site of smaller rank trains the first slots.
    """

    kind: ClassVar[str] = "flora"
    sum_only: ClassVar[bool] = False

    seed: Annotated[int, Field(ge=0)] = 0

    def check(self, layout: Layout) -> None:
        """A fold beside the factors."""
        require(self.kind, layout, gathering.FACTORS | gathering.FOLD, FIX)

    def roles(self, layout: Layout) -> frozenset[str]:
        """All."""
        return layout.roles

    def exact(self, layout: Layout) -> bool:
        """Only where the fold has the rank of the whole matrix; else until it is full, and then up to what the truncation drops."""
        return gathering.never_truncated(layout, gathering.SECOND)

    def phase(self, round: int, layout: Layout) -> Phase:
        """The same in every round: the sites never train the fold."""
        return gathering.both(round, layout, settles=gathering.FOLD)

    def travels(self, layout: Layout, phase: Phase) -> Layout:
        """The phase's roles; the fold only goes down."""
        return layout.subset(phase.roles)

    def mask(self, layout: Layout, phase: Phase, site: SiteContext) -> Mask | None:
        """The first slots, as many as the site can train; None for a site of full rank."""
        return Slots(pick="prefix").mask(layout, phase, site)

    def contribution(self, before: Tensors, after: Tensors, phase: Phase, site: SiteContext) -> Tensors:
        """The delta of everything; slots that the site did not train are zeros."""
        return difference(before, after, phase)

    def gather(self, current: Tensors, parts: Sequence[Part], phase: Phase) -> Tensors:
        """The deltas of the fold and of the fresh start, the mean of all else. Raises `UpdateError` when a part does not fit."""
        round, found, digest = gathering.Round.of(current, parts, phase), [], current.digest
        for pair, second in gathering.folds(current.layout):
            fold = round.fold(second)
            best = truncate([fold, *round.products(pair)], len(fold.a), start=fold.a)
            round.put(second, best[:2])
            round.put(pair, (np.zeros_like(round.start[pair.b]), self.restart(pair.a, round.start[pair.a].shape, digest)))
            found.append(best)
        return gathering.Gathered(round.out.layout, round.out.flat, share_lost(found))

    def restart(self, name: str, shape: tuple[int, ...], start: str) -> Factor:
        """A (r, in) uniform over its fan-in, from public values alone: ``seed``, its name, and the digest of the round's start."""
        key = hashlib.sha256(f"restart {self.seed} {name} {start}".encode()).digest()
        bound = 1.0 / np.sqrt(shape[1])
        return np.random.default_rng(int.from_bytes(key)).uniform(-bound, bound, shape).astype(np.float32)

    def advance(self, current: Tensors, mean: Tensors, phase: Phase, optimizer: ServerOptimizer, state: State) -> tuple[Tensors, State]:
        """Move factors and fold as gathered, all other roles by the optimizer's step."""
        return gathering.settle(current, mean, phase, optimizer, state)

    def drift(self, current: Tensors, mean: Tensors, phase: Phase) -> dict[str, float]:
        """``lost``: the share of the fold's energy that the truncation dropped."""
        return gathering.lost(mean)
