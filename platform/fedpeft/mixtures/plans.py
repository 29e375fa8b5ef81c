"""Which token meets which adapter, made once per `Bank.use` and read by every layer.

Shape legend: U units (rows of the batch, or tokens), S tokens per unit, N = U S tokens, M pairs of a unit and a slot, E experts in
the term, T slots of the slab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedpeft.errors import AdapterError
from fedpeft.mixtures.slabs import Slab

Batch = tuple[Tensor | None, slice, Tensor | None]
"""Tokens (None: all), the slots that share them equally in order, and the weight of each token."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """M pairs sorted by slot: ``place`` says which unit each is of, ``slots`` (M,) which slot; ``runs`` counts pairs by slot, on the host.

    ``weights`` (M,) scale what the slot adds; None: 1.
    """

    units: int
    place: slice | Tensor
    slots: Tensor
    runs: tuple[tuple[int, int], ...]
    capacity: int
    weights: Tensor | None = None

    @cached_property
    def uniform(self) -> tuple[int, int, int] | None:
        """(first slot, last + 1, pairs of each) where neighbouring slots have equally many pairs, so that no factor need be gathered."""
        slots, counts = [slot for slot, _ in self.runs], {count for _, count in self.runs}
        if len(counts) != 1 or slots != list(range(slots[0], slots[0] + len(slots))):
            return None
        return slots[0], slots[-1] + 1, counts.pop()

    @cached_property
    def ends(self) -> Tensor:
        """(T,) the number of pairs up to and with each slot, int32."""
        counts = torch.zeros(self.capacity, dtype=torch.int32)
        for slot, count in self.runs:
            counts[slot] = count
        return counts.cumsum(0, dtype=torch.int32).to(self.slots.device)

    def batches(self, tokens: int) -> Iterator[Batch]:
        """The pairs in groups of slots with equally many tokens each."""
        span = tokens // self.units
        places = torch.arange(self.units, device=self.slots.device)[self.place]
        every = (places.unsqueeze(1) * span + torch.arange(span, device=places.device)).flatten()
        weights = None if self.weights is None else self.weights.repeat_interleave(span)
        if self.uniform is not None:
            yield every, slice(self.uniform[0], self.uniform[1]), weights
            return
        start = 0
        for slot, count in self.runs:
            part = slice(start, start + count * span)
            yield every[part], slice(slot, slot + 1), None if weights is None else weights[part]
            start = part.stop

    def take(self, x: Tensor) -> Tensor:
        """(N, D) -> (M S, D), the tokens of each pair."""
        if isinstance(self.place, slice):
            span = x.shape[0] // self.units
            return x[self.place.start * span : self.place.stop * span]
        return x.view(self.units, -1, x.shape[1]).index_select(0, self.place).view(-1, x.shape[1])

    def give(self, y: Tensor, z: Tensor) -> None:
        """Add z (M S, D) to y (N, D) where its tokens are."""
        if isinstance(self.place, slice):
            self.take(y).add_(z)
        else:
            y.view(self.units, -1, y.shape[1]).index_add_(0, self.place, z.view(len(self.place), -1, y.shape[1]))


@dataclass(frozen=True, eq=False)
class Blend:
    """Weights (U, E) of every unit over the slots ``slots`` (E,) of a slab; ``run``: the slots are neighbours, from this one on."""

    units: int
    weights: Tensor
    slots: Tensor
    run: int | None
    capacity: int

    def batches(self, tokens: int) -> Iterator[Batch]:
        """Every expert over all tokens."""
        weights = self.weights.float().repeat_interleave(tokens // self.units, 0)
        for column, slot in enumerate(self.slots.tolist()):
            yield None, slice(slot, slot + 1), weights[:, column]


Plan = Pairs | Blend


@dataclass(frozen=True, eq=False)
class Share:
    """A slab's share of one term."""

    slab: Slab
    plan: Plan

    @cached_property
    def matrix(self) -> Tensor:
        """The weight of every unit on every slot, (U, T), float32."""
        plan, device = self.plan, self.slab.values.device
        empty = torch.zeros(plan.units, plan.capacity, device=device)
        if isinstance(plan, Blend):
            return empty.index_copy(1, plan.slots, plan.weights.float())
        units = torch.arange(plan.units, device=device)
        units = units[plan.place] if isinstance(plan.place, slice) else plan.place
        weights = torch.ones(len(units), device=device) if plan.weights is None else plan.weights.float()
        return empty.index_put((units, plan.slots), weights, accumulate=True)


def pairs_of_rows(picked: Sequence[int], capacity: int, device: torch.device) -> Pairs:
    """One slot per unit, -1 for none; at least one has one."""
    order = sorted((slot, unit) for unit, slot in enumerate(picked) if slot >= 0)
    return _pairs(len(picked), order, capacity, device, None)


def pairs_of_weights(weights: Tensor, slots: Sequence[int], capacity: int) -> Pairs | None:
    """The pairs with a weight other than 0 in ``weights`` (U, E); None when there are none. Waits for the device."""
    units, experts = (found.tolist() for found in weights.nonzero(as_tuple=True))
    order = sorted((slots[expert], unit, expert) for unit, expert in zip(units, experts, strict=True))
    if not order:
        return None
    values = weights[[unit for _, unit, _ in order], [expert for _, _, expert in order]]
    plain = bool((values == 1).all())
    return _pairs(len(weights), [(slot, unit) for slot, unit, _ in order], capacity, weights.device, None if plain else values)


def blend_of(weights: Tensor, slots: Sequence[int], capacity: int) -> Blend:
    """All of ``weights`` (U, E), zeros too."""
    run = slots[0] if list(slots) == list(range(slots[0], slots[0] + len(slots))) else None
    return Blend(len(weights), weights, torch.tensor(slots, device=weights.device), run, capacity)


def per_token(plan: Plan, tokens: int, module: str) -> int:
    """S, for a module that sees ``tokens`` tokens. Raises `AdapterError` when units do not divide them."""
    if tokens % plan.units:
        raise AdapterError(
            f"mixture: {module} got {tokens} tokens, the gates are for {plan.units} rows or tokens; set gates that fit the batch with use"
        )
    return tokens // plan.units


def _pairs(units: int, order: list[tuple[int, int]], capacity: int, device: torch.device, weights: Tensor | None) -> Pairs:
    counts: dict[int, int] = {}
    for slot, _ in order:
        counts[slot] = counts.get(slot, 0) + 1
    places = [unit for _, unit in order]
    straight = places == list(range(places[0], places[0] + len(places)))
    place = slice(places[0], places[-1] + 1) if straight else torch.tensor(places, device=device)
    return Pairs(units, place, torch.tensor([slot for slot, _ in order], device=device), tuple(counts.items()), capacity, weights)
