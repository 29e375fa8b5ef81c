"""What a federation's file would cost the rows of a site, before anything is trained or connected: per round, per run, spent so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from fedpeft import config
from fedpeft.errors import ConfigError
from fedpeft.privacy import promise
from fedpeft.privacy.accounting import epsilon
from fedpeft.privacy.secagg import Instance
from fedpeft.privacy.settings import PRIVACY, Client, Cohort, Distributed, Example, noise_for, of_adapter, scored_rounds
from fedpeft.update import TRAIN_COUNTERS, WORD
from fedpeft_client.privacy import Guard, Steps

if TYPE_CHECKING:
    from fedpeft.tensors import Layout
    from fedpeft.training.settings import TrainSettings
    from fedpeft_client.config import SiteConfig


@dataclass(frozen=True)
class Work:
    """What one task of one round would send: its name, the layout of its delta, its training, rows, and sites of the round."""

    task: str
    up: Layout
    settings: TrainSettings
    examples: int
    sites: int
    bits: int = WORD


@dataclass(frozen=True)
class Cost:
    """Epsilon at ``delta`` of one round, of all rounds of the run, of what this site's ledger holds, and of that with one round more.

    ``counters`` are all that leave inside the noised vector, which weighs as much as any other site's; None where plans noise nothing.
    """

    protects: str
    delta: float
    round: float
    run: float
    spent: float
    after: float
    protected: str
    counters: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return (
            f"{self.round:.3f} in a round, {self.run:.3f} in the run, {self.spent:.3f} spent here so far, at delta {self.delta:g}; "
            f"protects {self.protects} ({self.protected})"
        )


def cost(site: SiteConfig, table: Mapping[str, Any], work: Work) -> Cost | None:
    """What ``work`` would cost under a federation whose file says ``table``; None where nothing protects it.

    Raises:
        ConfigError: the file's privacy cannot be built.
        PrivacyError: no noise is enough, or the site's ledger is damaged.
    """
    try:
        settings = config.build(PRIVACY, table.get("privacy", "none"), "privacy")
    except ValueError as fault:
        raise ConfigError(str(fault)) from None
    rounds, guard = int(table.get("rounds", 10)), Guard(site.name, site.policy, site.state / "ledger")
    promised, steps = _promised(settings, table, work, rounds)
    events = guard.events(promised, work.up, steps)
    if not events:
        return None
    unit, event = events[-1]
    delta, after = site.policy.delta, guard.foresee("dry-run", work.task, "adapter", events).epsilon
    return Cost(
        protects="the whole site" if unit == "site" else "single rows",
        delta=delta,
        round=epsilon([event], delta),
        run=epsilon([event.times(rounds)], delta),
        spent=guard.ledger.spent(delta, work.task, unit=unit),
        after=after or 0.0,
        protected=guard.describe(promised),
        counters=tuple(settings.counters) if isinstance(settings, Client) else None,
    )


def _promised(settings: Any, table: Mapping[str, Any], work: Work, rounds: int) -> tuple[promise.Promise | None, Steps | None]:
    if isinstance(settings, Example):
        one = promise.single(settings, rounds)
        return one, Steps.of(one, work.settings, work.examples)
    if not isinstance(settings, Client):
        return None, None
    scored = scored_rounds(rounds, int(table.get("evaluate_every", 0)), int(table.get("publish_every", 0)))
    masks = table.get("secure_aggregation", {})
    if isinstance(settings, Distributed):
        settings = replace(settings, colluding=max(settings.colluding, float(masks.get("colluding", 0.1))))
    cohort = Cohort(work.sites, _fewest(work.sites, masks) if isinstance(settings, Distributed) else work.sites, work.bits)
    noise = noise_for(settings, rounds, scored)
    return promise.whole(settings, of_adapter(settings, noise, cohort, TRAIN_COUNTERS, settings.clip)), None


def _fewest(sites: int, masks: Mapping[str, Any]) -> int:
    """The fewest of ``sites`` whose noise is in a sum."""
    dropping = float(masks.get("dropping", 0.2))
    least = max(int(masks.get("least", 3)), ceil((1 - dropping) * sites))
    return Instance("", tuple(map(str, range(sites))), float(masks.get("colluding", 0.1)), dropping, least).fewest
