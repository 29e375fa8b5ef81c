"""A federation as its rounds see it: plain values and small callables, no torch, no configuration tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import Any

from fedpeft.bases.base import OWN
from fedpeft.errors import ConfigError
from fedpeft.privacy.secagg import Instance
from fedpeft.privacy.settings import Client, Example
from fedpeft.routing import BINS
from fedpeft.routing.closeness import CLOSENESS, TEXTED
from fedpeft.routing.moments import BUCKETS, MOMENTS, values_of
from fedpeft.routing.ngrams import NGRAMS
from fedpeft.routing.settings import Routing
from fedpeft.schemes import Gathers, Scheme, ServerOptimizer, Sharing
from fedpeft.schemes.robust import CombineRule
from fedpeft.tensors import Layout, Tensors
from fedpeft.update import Counters
from fedpeft.wire.codecs import Codec, DeltaCodec, Plain

Scores = Callable[[Counters], Mapping[str, float]]


@dataclass(frozen=True)
class TaskSetup:
    """One task: what sites must know of it (JSON forms), its layout, its round-0 tensors with their seed, its metrics.

    ``travel`` says about how far one value of a role moves in a round at most (`TrainSettings.travel`); ``counters`` are those that an
    evaluation may give, by name with their lengths. ``rows`` is what sites call its
    rows, where that is not its name: it is then one of several clusters of them.
    """

    name: str
    layout: Layout
    task_json: str
    spec_json: str
    settings_json: str
    initial: Callable[[], Tensors]
    seed: int
    scores: Scores = lambda _counters: {}
    travel: Callable[[str], float] = lambda _role: 0.0
    counters: Mapping[str, int] = field(default_factory=dict)
    rows: str = ""

    @property
    def lengths(self) -> dict[str, int]:
        """``counters``, and those that are never asked for under privacy."""
        width = self.counters.get("embedding.sum", 0)
        close = {CLOSENESS: BINS, TEXTED: BINS, NGRAMS: BUCKETS}
        return {**self.counters, **close, **({MOMENTS: values_of(width)} if width else {})}


@dataclass(frozen=True)
class Limits:
    """Who is asked and how long is waited (`fedpeft_coordinator.config.Cohort`), and what a site may claim and send."""

    min_sites: int = 1
    wait_for_sites: int = 1
    fraction: float = 1.0
    deadline: float = 600.0
    retries: int = 3
    reach: float = 2.0
    codec: Codec = field(default_factory=Plain)
    down: DeltaCodec | None = None
    budget: int = 0
    max_examples: int = 1_000_000
    root: str = ""


@dataclass(frozen=True)
class SecureAggregation:
    """Masked sums: the shares of sites that may collude and vanish, the fewest that a sum is opened over, seconds for a short exchange.

    ``grouped`` is the fewest for a sum over one of several groups of sites, ``identities`` are the public keys of sites that are not
    to be believed as they were first seen. ``full``: all but the share that may vanish must be in a sum, because they carry its noise.
    """

    colluding: float = 0.1
    dropping: float = 0.2
    least: int = 3
    grouped: int = 3
    deadline: float = 120.0
    task_blind: bool = False
    identities: Mapping[str, str] = field(default_factory=dict)
    full: bool = False

    def instance(self, name: str, members: tuple[str, ...], least: int) -> Instance:
        """The masked sum ``name`` over ``members``, of whom ``least`` at least are in it."""
        least = max(least, ceil((1 - self.dropping) * len(members))) if self.full else least
        return Instance(name, members, self.colluding, self.dropping, least)

    def fewest(self, sites: int) -> int:
        """The fewest of ``sites`` over whom a sum is opened. Raises `PrivacyError` when there are too few."""
        return self.instance("", tuple(map(str, range(sites))), self.least).fewest


@dataclass(frozen=True)
class Setup:
    """Everything that rounds need and that does not change while they run.

    ``identity`` is the base that a site must hold (empty accepts any), ``encoder`` what embeds rows, as router cards name it; ``combine``
    None is the sum, ``secure`` None lets sites send their parts of it in the clear, ``privacy`` None adds no noise. ``facts`` is what may
    not change between two starts on one state folder; the journal remembers it, and ``renew`` brings what it remembers up to date.
    """

    name: str
    seed: int
    rounds: int
    tasks: Mapping[str, TaskSetup]
    scheme: Scheme
    scheme_json: str
    server: ServerOptimizer
    limits: Limits = Limits()
    evaluate_every: int = 0
    publish_every: int = 0
    identity: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    combine: CombineRule | None = None
    renew: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    secure: SecureAggregation | None = None
    routing: Routing = field(default_factory=Routing)
    sharing: Sharing | None = None
    privacy: Client | Example | None = None
    encoder: str = ""

    def scores_after(self, number: int) -> bool:
        """Whether adapters are scored after round ``number``: every so many rounds, and after the last, where they are at all."""
        return self.evaluate_every > 0 and (number % self.evaluate_every == 0 or number == self.rounds)

    @property
    def moments(self) -> bool:
        """Whether second moments of embeddings are asked for; never under privacy, since nothing pays for their release."""
        return self.routing.moments and self.privacy is None

    @property
    def own_encoder(self) -> bool:
        """Whether every site's base embeds its rows."""
        return self.routing.encoder == (OWN,)

    @property
    def task_blind(self) -> bool:
        """Whether it is hidden which site holds which task: every site is asked for every task."""
        return self.secure is not None and self.secure.task_blind

    @cached_property
    def clusters(self) -> frozenset[str]:
        """Tasks that are one of several clusters of the same rows."""
        rows = Counter(task.rows or name for name, task in self.tasks.items())
        return frozenset(name for name, task in self.tasks.items() if rows[task.rows or name] > 1)

    @property
    def keeps_parts(self) -> bool:
        """Whether a round needs every site's part, not only their sum."""
        return isinstance(self.scheme, Gathers) or (self.combine is not None and not self.combine.sum_only)


def same_facts(known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a journal of another federation. Raises `ConfigError`."""
    changed = sorted(key for key in {*known, *now} if known.get(key) != now.get(key))
    if changed:
        raise ConfigError(
            f"the state folder belongs to a federation with other settings ({', '.join(changed)}); set them back, "
            "or start anew with another `state` folder"
        )
