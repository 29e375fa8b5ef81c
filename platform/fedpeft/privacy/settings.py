"""What the ``[privacy]`` table may say: who adds noise, how much may be spent, and on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field

from fedpeft.config import build
from fedpeft.errors import ConfigError, PrivacyError
from fedpeft.privacy.accounting import Event, calibrate
from fedpeft.privacy.mechanism import Bounded, Mechanism
from fedpeft.update import WORD

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
Chance = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Off:
    """No differential privacy: sums are released as they are."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True)
class Central:
    """A site is protected from whoever sees the adapters; the coordinator, who adds the noise to the sum, is trusted with sums.

    ``epsilon`` at ``delta`` is what one task may spend in the whole run. A site's delta is clipped to norm ``clip``; with a
    ``quantile`` above 0 that is only the start, and the norm moves by ``pace`` towards that quantile of the sites' norms. Of
    ``counters`` (names, and the largest value of one site) the noised sums are released; they and the bit of adaptive clipping
    take ``side`` of the squared sensitivity. Other counters are left out. ``evaluation`` is the noise of the counters of one
    evaluation over that of an adapter (4 costs a sixteenth of it); at 0 evaluations are not released. ``rate`` below 1: each
    site takes part in a round with that probability, by the coordinator's secret dice; only then is sampling accounted for.
    """

    kind: ClassVar[str] = "central"

    epsilon: Positive
    delta: Share = 1e-5
    clip: Positive = 1.0
    quantile: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pace: Positive = 0.2
    side: Share = 0.1
    counters: Mapping[str, Positive] = field(default_factory=dict)
    evaluation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    rate: Chance = 1.0


@dataclass(frozen=True)
class Distributed:
    """As `Central`, but every site adds its share of the noise under the masks, so that nobody is trusted with the sum.

    The least number of survivors that the masks let through brings the full noise by itself, without the share ``colluding`` of
    the cohort, who may tell their own. Sampling gains nothing here, since the coordinator sees who takes part.
    """

    kind: ClassVar[str] = "distributed"

    epsilon: Positive
    delta: Share = 1e-5
    clip: Positive = 1.0
    quantile: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pace: Positive = 0.2
    side: Share = 0.1
    counters: Mapping[str, Positive] = field(default_factory=dict)
    evaluation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    colluding: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rate: ClassVar[float] = 1.0


@dataclass(frozen=True)
class Example:
    """One row of one site is protected from everybody, the coordinator included: the site's engine trains by DP-SGD.

    ``epsilon`` at ``delta`` is what one row may lose to one task in the whole run; ``clip`` bounds a row's gradient.
    """

    kind: ClassVar[str] = "example"

    epsilon: Positive
    delta: Share = 1e-5
    clip: Positive = 1.0


Client = Central | Distributed
"""What protects whole sites."""

PRIVACY: dict[str, type[Any]] = {kind.kind: kind for kind in (Off, Central, Distributed, Example)}


def make_privacy(table: Any) -> Off | Central | Distributed | Example:
    """The settings that ``table`` says. Raises `ConfigError` with what is allowed."""
    try:
        return build(PRIVACY, table, "privacy")  # type: ignore[no-any-return]
    except ValueError as fault:
        raise ConfigError(f"privacy: {fault}") from None


def noise_for(settings: Client, rounds: int, evaluations: int | None = None) -> float:
    """The noise multiplier of adapters with which ``rounds`` of them and ``evaluations`` (as many, unless said) spend the budget.

    Raises:
        PrivacyError: no noise is enough.
    """
    concentrated = isinstance(settings, Distributed)
    scored = (rounds if evaluations is None else evaluations) if settings.evaluation else 0

    def events(noise: float) -> Sequence[Event]:
        kinds = [(1.0, rounds), (settings.evaluation, scored)]
        return [Event(noise * part, settings.rate, count, concentrated) for part, count in kinds if count]

    return calibrate(events, settings.epsilon, settings.delta)


def scored_rounds(rounds: int, evaluate_every: int, publish_every: int) -> int:
    """How many of ``rounds`` are followed by an evaluation: every so many (0: never), those that publish, and the last."""
    every = [step for step in (evaluate_every, publish_every) if step]
    return sum(number == rounds or any(number % step == 0 for step in every) for number in range(1, rounds + 1))


@dataclass(frozen=True)
class Cohort:
    """The ``sites`` that may take part in a round, the ``least`` that must be left for a result, ``bits`` of the ring of their sum."""

    sites: int
    least: int
    bits: int = WORD


def of_adapter(settings: Client, noise: float, cohort: Cohort, lengths: Mapping[str, int], clip: float) -> Mechanism:
    """The mechanism of one adapter's sum: ``noise`` from `noise_for`, ``clip`` of the round, ``lengths`` of the counters sites have.

    Raises:
        PrivacyError: colluding sites leave nobody to carry the noise.
    """
    counters = _counters(settings, lengths)
    adaptive = settings.quantile > 0
    side = settings.side if counters or adaptive else 0.0
    return Mechanism(noise, clip, cohort.sites, _shares(settings, cohort), side, counters, adaptive, settings.rate, cohort.bits)


def of_evaluation(settings: Client, noise: float, cohort: Cohort, lengths: Mapping[str, int]) -> Mechanism | None:
    """The mechanism of one evaluation's counters, or None where none are released. Raises `PrivacyError` as `of_adapter` does."""
    counters = _counters(settings, lengths)
    if not (settings.evaluation and counters):
        return None
    return Mechanism(
        noise * settings.evaluation, 1.0, cohort.sites, _shares(settings, cohort), side=1.0, counters=counters, rate=settings.rate
    )


def _counters(settings: Client, lengths: Mapping[str, int]) -> dict[str, Bounded]:
    return {name: Bounded(lengths[name], limit) for name, limit in sorted(settings.counters.items()) if name in lengths}


def _shares(settings: Client, cohort: Cohort) -> int:
    """Honest survivors that there are at least; 0 where the coordinator adds the noise."""
    if not isinstance(settings, Distributed):
        return 0
    honest = cohort.least - int(settings.colluding * cohort.sites)
    if honest < 1:
        raise PrivacyError(
            f"privacy: {cohort.least} survivors of {cohort.sites} sites, {settings.colluding:g} of them colluding, leave nobody to carry "
            "the noise; raise the quorum or lower privacy.colluding"
        )
    return honest


def steps_noise(settings: Example, rate: float, steps: int) -> float:
    """The noise multiplier of DP-SGD with which ``steps`` steps, each row taken with probability ``rate``, spend the budget.

    Raises:
        PrivacyError: no noise is enough, or ``rate`` is not in (0, 1].
    """
    return calibrate(lambda noise: [Event(noise, rate, steps)], settings.epsilon, settings.delta)


def check_phase(settings: Any, linear: bool, scheme: str) -> None:
    """Refuse client-level noise where two factors that multiply move in one round: noise times noise (ALGORITHMS A6).

    ``linear`` is what `fedpeft.schemes.base.linear` says of the phase's roles.

    Raises:
        PrivacyError: the two settings clash.
    """
    if isinstance(settings, Central | Distributed) and not linear:
        raise PrivacyError(
            f"privacy: kind = {settings.kind!r} needs rounds that move one factor, scheme {scheme!r} moves two that multiply; "
            "choose alternating, ffa or fedsb, or kind = 'example'"
        )
