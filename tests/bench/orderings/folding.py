"""FedEx-LoRA's three ways to go on after an exact aggregation (Singhal et al. 2024, arXiv 2410.09432, table 4).

In all three the global weights after a round are the weighted mean of the sites' weights, because what the adapters of the next
round do not say is folded into the frozen weights. They differ in the adapters: ``restart`` draws A anew and sets B to zero,
``keep`` leaves each site its own, ``fedex`` gives all sites the mean factors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tests.bench.orderings.simulate import Mask, Place, base_weights

from fedpeft.adapters.live import Live
from fedpeft.factors import pairs
from fedpeft.methods.values import uniform_fan_in
from fedpeft.schemes import Phase
from fedpeft.tensors import Layout, Tensors

Products = dict[str, NDArray[np.float64]]


@dataclass
class Folded:
    """One run of an arm: ``total`` is the change of the global weights so far, ``own`` each site's adapter of its last round."""

    arm: Literal["restart", "keep", "fedex"]
    shares: tuple[float, ...]
    total: Products = field(default_factory=dict)
    own: dict[int, Tensors] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    gain: Products = field(default_factory=dict)

    def phase(self, round: int, layout: Layout) -> Phase:
        """All roles in every round."""
        return Phase("all", layout.roles)

    def begin(self, live: Live, current: Tensors, place: Place) -> Tensors:
        """The arm's adapter; the frozen weights hold what it does not say."""
        start = self._start(current, place)
        self._fold(live, start)
        return start

    def mask(self, layout: Layout, phase: Phase, place: Place) -> Mask | None:
        """Everywhere."""

    def finish(self, before: Tensors, after: Tensors, phase: Phase, place: Place) -> Tensors:
        """The delta; the site's product is kept in the clear, as these rules need it."""
        self.own[place.site] = after
        old, new = products(before), products(after)
        for name in new:
            self.gain[name] = self.gain.get(name, 0.0) + self.shares[place.site] * (new[name] - old[name])
        return after - before

    def advance(self, current: Tensors, mean: Tensors, phase: Phase) -> Tensors:
        """Add the mean gain to the global weights; the adapter moves by the mean delta, which only ``fedex`` hands out."""
        self.total = {name: self.total.get(name, 0.0) + gain for name, gain in self.gain.items()}
        self.gain = {}
        return current + mean if self.arm == "fedex" else current.patch(current.pick({"head"}) + mean.pick({"head"}))

    def show(self, live: Live, current: Tensors) -> Tensors:
        """The global weights: all of the change folded, no adapter."""
        bare = current.patch(Tensors.zeros(current.layout.subset({"B"})))
        self._fold(live, bare)
        return bare

    def _start(self, current: Tensors, place: Place) -> Tensors:
        if self.arm == "keep" and place.site in self.own:
            return self.own[place.site].patch(current.pick({"head"}))
        if self.arm == "restart" and place.round > 1:
            return current.patch(fresh(current.layout.subset({"A"}), place))
        return current

    def _fold(self, live: Live, adapter: Tensors) -> None:
        weights = base_weights(live)
        self.kept = self.kept or {name: weight.detach().clone() for name, weight in weights.items()}
        for name, said in products(adapter).items():
            rest = torch.from_numpy((self.total.get(name, 0.0) - said).astype(np.float32))
            weights[name].data.copy_(self.kept[name] + rest)


def products(adapter: Tensors) -> Products:
    """Module -> B A (O, I) in float64."""
    named = adapter.named()
    found = pairs(adapter.layout)
    return {pair.a.removesuffix(".lora_A.weight"): named[pair.b].astype(np.float64) @ named[pair.a].astype(np.float64) for pair in found}


def fresh(layout: Layout, place: Place) -> Tensors:
    """A new draw of every A, the same at all sites of a round."""
    rng = np.random.default_rng([place.seed, place.round])
    return Tensors.from_named(layout, {entry.name: uniform_fan_in(entry, rng) for entry in layout.entries})
