"""J: what hiding whole sites costs in accuracy, by the number of sites, beside the same federation without privacy.

The demo's task ``area`` on the packaged encoder, its rows dealt evenly to so many sites; alternating LoRA of rank 2 on the top two
layers, every site in every round. Sites protect and the coordinator releases by the platform's own `protect` and `release`
(central noise, adaptive clipping at the median; distributed noise is of the same size). Accuracy of one run on held-out rows; the
noise is not seeded, so a second run gives other figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tests.bench.orderings.partition import dirichlet
from tests.bench.orderings.shallow import make_shallow, warm
from tests.bench.orderings.world import World, pick

from fedpeft.adapters import attach, initial
from fedpeft.adapters.live import Live
from fedpeft.bases import BaseSpec, load_base
from fedpeft.privacy.accounting import Event, epsilon
from fedpeft.privacy.clipping import moved
from fedpeft.privacy.mechanism import Mechanism, protect, release
from fedpeft.privacy.metric import Metric
from fedpeft.privacy.noise import SecureNoise
from fedpeft.privacy.settings import Central, Cohort, noise_for, of_adapter
from fedpeft.schemes import SCHEMES, SGD, Phase, SiteContext, Sum
from fedpeft.tasks import Classification, Encoded, Source, read_rows
from fedpeft.tasks.stdlib import STDLIB_LABELS
from fedpeft.tensors import Tensors
from fedpeft.training import TrainJob, TrainSettings, evaluate, train
from fedpeft.update import TRAIN_COUNTERS

SITES, ROUNDS, EPSILON, DELTA = (3, 30, 100), 8, 8.0, 1e-5
TRAINING = TrainSettings(steps=2, batch_size=8, lr=5e-3, lr_by_role={"head": 1e-2})
CENTRAL = Central(EPSILON, DELTA, clip=1.0, quantile=0.5)
LAYERS, MAX_TOKENS, SEED = 2, 32, 11
EVENLY = 1e6
"""Dirichlet's alpha: the same mix of labels everywhere, so that what is seen is the noise."""


def run(repeats: int = 1) -> list[dict[str, object]]:
    """Accuracy with and without privacy for each number of sites; ``repeats`` is ignored, since one run takes two minutes."""
    world = demo_world()
    rows: list[dict[str, object]] = []
    for count in SITES:
        sites = tuple(pick(world.splits["train"], places) for places in dirichlet(world.splits["train"].labels, count, EVENLY, SEED))
        private, plain = federate(world, sites, private=True), federate(world, sites, private=False)
        case = f"accuracy, {count} sites, {ROUNDS} rounds, epsilon {spent():.2f} for a whole site"
        rows.append({"row": "J", "case": case, "ours": private, "peer": plain, "unit": "accuracy (peer: no privacy)"})
    return rows


def demo_world() -> World:
    """The demo's rows of ``area``, the encoder's frozen bottom computed for each."""
    base = load_base(BaseSpec("minilm", max_tokens=MAX_TOKENS), "cpu")
    make_shallow(base, LAYERS)
    task, source = Classification("area", STDLIB_LABELS["area"]), Source(package="stdlib", where={"task": "area"})
    splits = {name: task.encode(read_rows(source, name), base) for name in ("train", "test")}
    for data in splits.values():
        warm(base, data)
    return World(base, task, splits)


def spent() -> float:
    """What the run's adapters cost."""
    return epsilon([Event(noise_for(CENTRAL, ROUNDS), 1.0, ROUNDS)], DELTA)


def federate(world: World, sites: Sequence[Encoded], private: bool) -> float:
    """Accuracy of the global adapter after all rounds."""
    spec, scheme = world.spec(2), SCHEMES["alternating"]()
    current, clip = initial(world.base, spec, SEED).tensors, CENTRAL.clip
    with attach(world.base, spec) as live:
        for number in range(1, ROUNDS + 1):
            phase = scheme.phase(number, spec.layout)
            parts = [_part(world, live, current, phase, (data, number * 1000 + site)) for site, data in enumerate(sites)]
            if private:
                mechanism = of_adapter(CENTRAL, noise_for(CENTRAL, ROUNDS), Cohort(len(sites), len(sites)), TRAIN_COUNTERS, clip)
                mean, inside = _noised(current, parts, phase, mechanism)
                clip = moved(clip, inside, CENTRAL.quantile, CENTRAL.pace, CENTRAL.clip)
            else:
                mean = Tensors(parts[0].layout, np.mean([part.flat for part in parts], axis=0, dtype=np.float64).astype(np.float32))
            current, _ = scheme.advance(current, mean, phase, SGD(), {})
        live.load(current)
        return float(world.task.scores(evaluate(live, world.task, world.splits["test"]))["accuracy"])


def _part(world: World, live: Live, current: Tensors, phase: Phase, site: tuple[Encoded, int]) -> Tensors:
    """One site's delta."""
    data, seed = site
    live.load(current)
    train(live, world.task, data, TRAINING, TrainJob(phase.trains, seed))
    return SCHEMES["alternating"]().contribution(current, live.read(), phase, SiteContext(seed))


def _noised(current: Tensors, parts: Sequence[Tensors], phase: Phase, mechanism: Mechanism) -> tuple[Tensors, float]:
    """The released mean, and the share of sites that were inside the clip."""
    metric, source = Metric.of(current, phase.roles), SecureNoise()
    total = Sum(mechanism.layout(parts[0].layout), mechanism.grid)
    for part in parts:
        total.add(protect(metric.into(part), {}, mechanism, source))
    found = release(total.result(), mechanism, source)
    return metric.back(found.mean), float(found.inside or 0.0)


if __name__ == "__main__":
    for row in run():
        print(row)
