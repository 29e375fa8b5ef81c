"""A federation in one process, of the platform's own parts: sites train with its loop, sums are its integer updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tests.bench.orderings.world import World

from fedpeft.adapters import attach, initial
from fedpeft.adapters.live import Live
from fedpeft.errors import UpdateError
from fedpeft.schemes import SGD, Masks, Phase, Scheme, SiteContext, State, Sum, check_start
from fedpeft.tasks import Encoded
from fedpeft.tensors import Layout, Tensors
from fedpeft.training import TrainJob, TrainSettings, evaluate, train
from fedpeft.update import Grid, Update

Mask = NDArray[np.bool_]
REACH = 8.0


@dataclass(frozen=True)
class Setting:
    """A federation: every site takes part in every round; ``alpha`` is the Dirichlet label skew, ``batch`` in examples."""

    sites: int
    alpha: float
    rounds: int
    steps: int
    batch: int = 8


@dataclass(frozen=True)
class Local:
    """How a site trains: the learning rate, A's share of it, and the head's own (None: the same)."""

    lr: float
    ratio: float = 1.0
    head: float | None = None

    def settings(self, setting: Setting) -> TrainSettings:
        """Adam as the loop has it, fresh in each round."""
        rates = {"A": self.lr * self.ratio, "head": self.head or self.lr}
        return TrainSettings(steps=setting.steps, batch_size=setting.batch, lr=self.lr, lr_by_role=rates)


@dataclass(frozen=True)
class Place:
    """Which site in which round, and its share of all rows; ``seed`` is that of the round."""

    site: int
    round: int
    seed: int

    @property
    def context(self) -> SiteContext:
        """What the schemes are told."""
        return SiteContext(self.seed * 1000 + self.round, f"site-{self.site}")


class Rule(Protocol):
    """Both halves of a round, as the experiments vary them."""

    def phase(self, round: int, layout: Layout) -> Phase:
        """What trains in ``round``."""
        ...

    def begin(self, live: Live, current: Tensors, place: Place) -> Tensors:
        """What the site starts from; the frozen weights may change here."""
        ...

    def mask(self, layout: Layout, phase: Phase, place: Place) -> Mask | None:
        """True where the site trains, over ``layout.subset(phase.trains)``."""
        ...

    def finish(self, before: Tensors, after: Tensors, phase: Phase, place: Place) -> Tensors:
        """What travels."""
        ...

    def advance(self, current: Tensors, mean: Tensors, phase: Phase) -> Tensors:
        """The global adapter after the round, from the weighted mean of what travelled."""
        ...

    def show(self, live: Live, current: Tensors) -> Tensors:
        """What is scored."""
        ...


@dataclass
class ByScheme:
    """One of the platform's schemes, with plain server averaging."""

    scheme: Scheme
    ranks: tuple[int, ...] = ()
    state: State = field(default_factory=dict)

    def phase(self, round: int, layout: Layout) -> Phase:
        """The scheme's."""
        return self.scheme.phase(round, layout)

    def begin(self, live: Live, current: Tensors, place: Place) -> Tensors:
        """The global adapter."""
        return current

    def mask(self, layout: Layout, phase: Phase, place: Place) -> Mask | None:
        """The scheme's, where it has one."""
        return self.scheme.mask(layout, phase, self._context(place)) if isinstance(self.scheme, Masks) else None

    def finish(self, before: Tensors, after: Tensors, phase: Phase, place: Place) -> Tensors:
        """The scheme's contribution."""
        return self.scheme.contribution(before, after, phase, self._context(place))

    def advance(self, current: Tensors, mean: Tensors, phase: Phase) -> Tensors:
        """The scheme's step."""
        current, self.state = self.scheme.advance(current, mean, phase, SGD(), self.state)
        return current

    def show(self, live: Live, current: Tensors) -> Tensors:
        """The global adapter."""
        return current

    def _context(self, place: Place) -> SiteContext:
        known = place.context
        return SiteContext(known.seed, known.name, self.ranks[place.site] if self.ranks else None)


@dataclass(frozen=True)
class Job:
    """One run: rank, seed of partition, start and order, how sites train, and the split to score on."""

    rank: int
    seed: int
    local: Local
    split: str = "test"


def federate(world: World, setting: Setting, rule: Rule, job: Job) -> dict[int, float]:
    """Accuracy of the global model after half of the rounds and after all; 0 once training has diverged."""
    spec = world.spec(job.rank)
    sites = world.sites(setting.sites, setting.alpha, job.seed)
    current = initial(world.base, spec, job.seed).tensors
    found: dict[int, float] = {}
    with attach(world.base, spec) as live, original_weights(live):
        for round in range(1, setting.rounds + 1):
            try:
                current = one_round(world, live, sites, (setting, rule, job), current, round)
            except UpdateError:
                return found | {setting.rounds: 0.0}
            if round in (setting.rounds // 2, setting.rounds):
                live.load(rule.show(live, current))
                found[round] = world.task.scores(evaluate(live, world.task, world.splits[job.split]))["accuracy"]
    return found


def one_round(
    world: World, live: Live, sites: tuple[Encoded, ...], how: tuple[Setting, Rule, Job], current: Tensors, round: int
) -> Tensors:
    """Every site trains from ``current``; the global adapter after the sum of their updates."""
    setting, rule, job = how
    phase, total = rule.phase(round, current.layout), None
    check_start(current, phase)
    grid, cap = Grid(len(sites), REACH), max(map(len, sites))
    for number, data in enumerate(sites):
        place = Place(number, round, job.seed)
        before = rule.begin(live, current, place)
        live.load(before)
        with masked(live, rule.mask(current.layout, phase, place), phase):
            task = TrainJob(roles=phase.trains, seed=(job.seed * 1000 + round) * 100 + number)
            train(live, world.task, data, job.local.settings(setting), task)
        part = rule.finish(before, live.read(), phase, place)
        total = total or Sum(part.layout, grid)
        total.add(Update.encode(part, len(data) / cap, {}, grid))
    assert total is not None
    return rule.advance(current, total.result().mean(), phase)


@contextmanager
def masked(live: Live, mask: Mask | None, phase: Phase) -> Iterator[None]:
    """Let no gradient through where ``mask``, over the trained roles, is False; Adam does not move what never had one."""
    if mask is None:
        yield
        return
    layout = live.spec.layout.subset(phase.trains)
    live.train_roles(phase.trains)
    handles = []
    for entry in layout.entries:
        keep = torch.from_numpy(mask[layout.spans[entry.name]].reshape(entry.shape))
        if not keep.all():
            handles.append(live.parameters[entry.name].register_hook(keep.mul))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def base_weights(live: Live) -> dict[str, torch.Tensor]:
    """Module -> frozen weight (O, I) of every layer that carries a LoRA pair."""
    names = [entry.name.removesuffix(".lora_A.weight") for entry in live.spec.layout.subset({"A"}).entries]
    return {name: live.model.get_submodule(name.removeprefix("base_model.model.")).get_base_layer().weight for name in names}  # type: ignore[operator]


@contextmanager
def original_weights(live: Live) -> Iterator[None]:
    """Put the frozen weights back at the end, whatever a rule folded into them."""
    kept = {name: weight.detach().clone() for name, weight in base_weights(live).items()}
    try:
        yield
    finally:
        for name, weight in base_weights(live).items():
            weight.data.copy_(kept[name])
