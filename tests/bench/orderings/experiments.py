"""The three experiments: their settings, arms and the claims that their tables test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.bench.orderings.cells import Store
from tests.bench.orderings.folding import Folded
from tests.bench.orderings.padding import Padded
from tests.bench.orderings.simulate import ByScheme, Job, Local, Rule, Setting, federate
from tests.bench.orderings.world import World

from fedpeft.schemes import FFA, Alternating, FedAvg, Phase, Slots
from fedpeft.tensors import Layout

RATES = (3e-3, 1e-2, 3e-2, 1e-1)
HEAD_RATES = (1e-2, 3e-2, 1e-1, 3e-1)
HEAD_RATE = 1e-1
"""What `head_only` chose."""
RANKS_RATES = (3e-3, 1e-2)
"""At 3e-2 and more even zero-padding, the most damped of the rules, diverged at rank 16 on the seed of the choice."""
CHOICE_SEED = 100
"""Learning rates are chosen on this seed's partition and the validation rows; it is never reported."""

Shares = tuple[float, ...]


class HeadOnly(ByScheme):
    """No adapter: what the shared head alone learns."""

    def phase(self, round: int, layout: Layout) -> Phase:
        """The head."""
        return Phase("head", frozenset({"head"}))


@dataclass(frozen=True)
class Arm:
    """One row of a table: how its rule is made from the sites' shares, A's share of the learning rate, and the head's own."""

    make: Callable[[Shares], Rule]
    ratio: float = 1.0
    head: float | None = None


@dataclass(frozen=True)
class Experiment:
    """Every arm at every rank and seed; ``rates_by`` names the arm whose learning rate all share, None: each its own.

    Experiments of one ``name`` share their cells.
    """

    name: str
    setting: Setting
    arms: dict[str, Arm]
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    choice_rank: int
    rates: tuple[float, ...] = RATES
    rates_by: str | None = None


@dataclass(frozen=True)
class Outcome:
    """Chosen learning rates, validation accuracy by arm and rate, test accuracy by arm, rank and seed; None: not run."""

    rates: dict[str, float]
    choice: dict[str, dict[float, float | None]]
    accuracy: dict[str, dict[int, dict[int, float | None]]]


HETEROGENEOUS = (4, 8, 16)


def lora_a2() -> Experiment:
    """LoRA-A2 (Koo et al. 2024, arXiv 2410.22815), tables 2-3: label skew 0.01, low ranks; alternating > FedIT > FFA."""
    arms = {
        "alternating": Arm(lambda _: ByScheme(Alternating())),
        "alternating, A at lr/5": Arm(lambda _: ByScheme(Alternating()), 0.2),
        "fedavg": Arm(lambda _: ByScheme(FedAvg())),
        "ffa": Arm(lambda _: ByScheme(FFA())),
    }
    return Experiment("lora_a2", Setting(8, 0.01, 20, 5), arms, (1, 2, 4, 8), (0, 1, 2), 2)


def head_only() -> Experiment:
    """The setting of `lora_a2` without an adapter: what its accuracies are to be read against."""
    return replace(
        lora_a2(), name="head_only", arms={"head only": Arm(lambda _: HeadOnly(FedAvg()))}, ranks=(1,), choice_rank=1, rates=HEAD_RATES
    )


def lora_a2_head() -> Experiment:
    """`lora_a2` with the head at the learning rate that is best for it alone, so that arms differ in the factors only."""
    found = lora_a2()
    arms = {name: replace(arm, head=HEAD_RATE) for name, arm in found.arms.items()}
    return replace(found, arms=arms, ranks=(1, 2), rates=RATES[1:])


def restart() -> Experiment:
    """FedEx-LoRA (arXiv 2410.09432), table 4: re-initialised adapters 53.46, kept local ones 78.41, the mean 84.39; equal sites."""
    arms = {
        "restart": Arm(lambda shares: Folded("restart", shares)),
        "keep": Arm(lambda shares: Folded("keep", shares)),
        "fedex": Arm(lambda shares: Folded("fedex", shares)),
        "fedavg": Arm(lambda _: ByScheme(FedAvg())),
    }
    return Experiment("restart", Setting(3, 100.0, 15, 8), arms, (4,), (0, 1, 2), 4, rates_by="fedavg")


def restart_skewed() -> Experiment:
    """`restart` under label skew 0.1 over eight sites."""
    return replace(restart(), name="restart_skewed", setting=Setting(8, 0.1, 20, 5))


def ranks() -> Experiment:
    """Three skewed sites of ranks 4, 8 and 16: corrected rules against zero-padded values."""
    arms = {
        "zero-pad": Arm(lambda shares: Padded("zero", HETEROGENEOUS, shares)),
        "mass-corrected values": Arm(lambda shares: Padded("mass", HETEROGENEOUS, shares)),
        "slots, delta, alternating": Arm(lambda _: ByScheme(Slots(), HETEROGENEOUS)),
        "slots, delta, both": Arm(lambda _: ByScheme(Slots(factors="both", probes=0), HETEROGENEOUS)),
        "slots, mass, both": Arm(lambda _: ByScheme(Slots(average="mass", factors="both"), HETEROGENEOUS)),
        "slot mean of values": Arm(lambda shares: Padded("slot", HETEROGENEOUS, shares)),
    }
    return Experiment("ranks", Setting(3, 0.1, 20, 5), arms, (16,), (0, 1, 2, 3, 4), 16, RANKS_RATES)


def ranks_one_rate() -> Experiment:
    """`ranks` with every arm at the learning rate that is best for zero-padding."""
    return replace(ranks(), rates_by="zero-pad")


def ranks_control() -> Experiment:
    """`ranks` with zero-padded values under alternation: whether it is the correction or the alternation that tells."""
    arms = {"zero-pad, alternating": Arm(lambda shares: Padded("zero", HETEROGENEOUS, shares, Alternating()))}
    return replace(ranks(), name="ranks_control", arms=arms)


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "lora_a2": lora_a2,
    "head_only": head_only,
    "lora_a2_head": lora_a2_head,
    "restart": restart,
    "ranks": ranks,
    "ranks_one_rate": ranks_one_rate,
    "ranks_control": ranks_control,
    "restart_skewed": restart_skewed,
}


def quick(experiment: Experiment) -> Experiment:
    """A shape of the experiment that runs in seconds; too short to read an ordering from."""
    setting = replace(experiment.setting, sites=min(experiment.setting.sites, 4), rounds=2, steps=2)
    return replace(experiment, setting=setting, ranks=experiment.ranks[:1], seeds=(0,), rates=(1e-2,))


def conduct(world: World, experiment: Experiment, store: Store) -> Outcome:
    """Choose the learning rates, then run every cell, seed by seed."""
    choice = choose(world, experiment, store)
    best = {arm: max(found, key=lambda rate: found[rate] or 0.0) for arm, found in choice.items()}
    rates = {arm: best[experiment.rates_by or arm] for arm in experiment.arms}
    accuracy: dict[str, dict[int, dict[int, float | None]]] = {arm: {rank: {} for rank in experiment.ranks} for arm in experiment.arms}
    for seed in experiment.seeds:
        for rank in experiment.ranks:
            for name, arm in experiment.arms.items():
                job = Job(rank, seed, Local(rates[name], arm.ratio, arm.head))
                accuracy[name][rank][seed] = _cell(world, experiment, store, name, job)
    return Outcome(rates, choice, accuracy)


def choose(world: World, experiment: Experiment, store: Store) -> dict[str, dict[float, float | None]]:
    """Validation accuracy by arm and learning rate; nothing is run where there is one rate alone."""
    arms = [experiment.rates_by] if experiment.rates_by else list(experiment.arms)
    if len(experiment.rates) == 1:
        return {arm: {experiment.rates[0]: None} for arm in arms}
    return {arm: {rate: _cell(world, experiment, store, arm, _choice(experiment, arm, rate)) for rate in experiment.rates} for arm in arms}


def _choice(experiment: Experiment, arm: str, rate: float) -> Job:
    return Job(experiment.choice_rank, CHOICE_SEED, Local(rate, experiment.arms[arm].ratio, experiment.arms[arm].head), "validation")


def _cell(world: World, experiment: Experiment, store: Store, arm: str, job: Job) -> float | None:
    def run() -> dict[int, float]:
        sizes = [len(site) for site in world.sites(experiment.setting.sites, experiment.setting.alpha, job.seed)]
        rule = experiment.arms[arm].make(tuple(size / sum(sizes) for size in sizes))
        return federate(world, experiment.setting, rule, job)

    return store.cell(experiment.name, arm, experiment.setting, job, run)
