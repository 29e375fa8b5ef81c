"""What would leave this site in one round of a federation, tensor by tensor, before anything is trained or connected.

The federation's file is read here for its plain parts alone: the coordinator's own settings are none of a site's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from fedpeft import config
from fedpeft.bases import meta_encoder
from fedpeft.bases.base import OWN
from fedpeft.errors import ConfigError, DataError, PolicyError
from fedpeft.privacy.packing import LIMBS, Schema
from fedpeft.privacy.secagg import LEAST, enough
from fedpeft.routing import BINS
from fedpeft.routing.cardfile import lora_modules
from fedpeft.routing.closeness import CLOSENESS, TEXTED
from fedpeft.routing.moments import BUCKETS, MOMENTS, values_of
from fedpeft.routing.ngrams import NGRAMS
from fedpeft.routing.settings import Routing
from fedpeft.schemes import SCHEMES, Scheme
from fedpeft.schemes.robust import COMBINES
from fedpeft.tensors import Layout
from fedpeft.training.outline import Outline
from fedpeft.update import TRAIN_COUNTERS, WORD, Grid, train_counters
from fedpeft.wire import flat
from fedpeft.wire.codecs import CODECS, Codec, Lanes, Ring, as_ring, choose
from fedpeft_client import foresight, policy
from fedpeft_client.config import SiteConfig
from fedpeft_client.foresight import Cost, cost
from fedpeft_client.plan import rank_of
from fedpeft_client.policy import Ask, today
from fedpeft_client.shelf import Shelf, Split

if TYPE_CHECKING:
    from fedpeft.adapters import AdapterSpec
    from fedpeft.bases import Base
    from fedpeft.tasks import Task
    from fedpeft.training.settings import TrainSettings

FLOAT_BYTES, CODE_BYTES = 8, 4
SPLITS: tuple[Split, Split] = ("train", "test")
EPSILON = "none: not accounted"


class Plain(Outline):
    """The parts of a federation.toml that decide what a site sends; every other key is passed over."""

    scheme: Any = "alternating"
    combine: Any = "sum"
    cohort: dict[str, Any] = Field(default_factory=dict)
    secure_aggregation: dict[str, Any] = Field(default_factory=dict)
    wire: dict[str, Any] = Field(default_factory=dict)
    routing: dict[str, Any] = Field(default_factory=dict)
    privacy: Any = "none"
    evaluate_every: int = 0
    publish_every: int = 0
    max_examples: int = 1_000_000

    @property
    def least(self) -> int:
        """Fewest sites of a round."""
        return int(self.cohort.get("min_sites", 1))

    @property
    def expected(self) -> int:
        """Sites of a round, as far as the file says."""
        return int(self.cohort.get("wait_for_sites") or self.least)

    @property
    def task_blind(self) -> bool:
        """Whether the file hides who holds which task: zeros of the same size then leave for every other task."""
        return bool(self.secure_aggregation.get("task_blind", False))

    @property
    def masked(self) -> bool:
        """Whether the file promises masked sums; a plan must then bring them."""
        wanted = self.secure_aggregation.get("enabled", "auto")
        return self.least >= LEAST if wanted == "auto" else bool(wanted)

    @property
    def hidden(self) -> int:
        """Fewest sites of a round, or in a masked sum that the coordinator sees: over the round, or over a group of its sites."""
        if not self.masked:
            return self.least
        least = int(self.secure_aggregation.get("least", 0))
        if self.combine in (None, "sum", {"kind": "sum"}):
            return max(self.least, least)
        rule = config.build(COMBINES, self.combine, "combine")
        return least or enough(getattr(rule, "size", 0), float(self.secure_aggregation.get("dropping", 0.2)))


@dataclass(frozen=True)
class Line:
    """One tensor that leaves, as int32 codes on the plan's grid or in the plan's codec; ``bytes`` at most."""

    name: str
    role: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Forecast:
    """What one task would send in the round: nothing when the policy refuses it.

    ``counters`` maps names to numbers of values; the weight is ``examples`` over the plan's cap, at most 1; ``private`` names the
    roles that train and stay, ``cost`` is what ``epsilon`` says in words. ``masked``: tensors, weight and counters leave as one vector
    under masks, and only the sum over sites is ever opened. ``scores`` are metrics of which sums over ``tested`` rows leave where rounds
    are scored.
    """

    task: str
    phase: str
    examples: int
    weight: str
    tensors: tuple[Line, ...]
    counters: Mapping[str, int]
    bytes: int
    epsilon: str
    rules: tuple[str, ...]
    refused: str | None = None
    private: tuple[str, ...] = ()
    masked: bool = False
    cost: Cost | None = None
    scores: tuple[str, ...] = ()
    tested: int = 0

    @property
    def routing(self) -> dict[str, int]:
        """The ``counters`` that leave in an answer of their own, before a version is published."""
        return {name: count for name, count in self.counters.items() if name not in TRAIN_COUNTERS}

    @property
    def routing_bytes(self) -> int:
        """Bytes of ``routing``: a float each, or the words of one on the grid under masks."""
        return sum(self.routing.values()) * (LIMBS * CODE_BYTES if self.masked else FLOAT_BYTES)


def read_plan(path: Path) -> Plain:
    """The plain parts of the federation's file. Raises `ConfigError`."""
    return config.parse(config.read_toml(path), Plain, str(path))


def forecast(site: SiteConfig, plain: Plain, number: int = 1) -> list[Forecast]:
    """What leaves in round ``number`` (from 1) for each task of the federation that the site holds.

    Raises:
        ConfigError: the federation's method, scheme, training or a task cannot be built, or the site holds none of its tasks.
        BaseError: the base cannot be found.
        DataError: a task's rows cannot be read, or one of them does not fit the task.
    """
    from fedpeft.bases import meta_base

    shared = sorted(site.allowed_tasks & set(plain.tasks))
    if not shared:
        raise ConfigError(
            f"site {site.name} holds {sorted(site.allowed_tasks)}, the federation trains {sorted(plain.tasks)}; nothing in common"
        )
    base, shelf = meta_base(site.base.spec()), Shelf(site)
    return [_one(site, plain, name, base, shelf, number) for name in shared]


def _one(site: SiteConfig, plain: Plain, name: str, base: Base, shelf: Shelf, number: int) -> Forecast:
    task, spec, scheme, settings = _nouns(plain, name, base)
    phase = scheme.phase(number, spec.layout)
    up = scheme.travels(spec.layout, phase)
    examples = len(shelf.rows(name, "train"))
    if examples == 0:
        raise DataError(f"task {name!r}: the train split holds no rows; check [data] of the site's file")
    for split in SPLITS[: 2 if shelf.count(name, "test") else 1]:
        shelf.encoded(task, split, base)  # a row that training or scoring would refuse is refused here
    counters = {**TRAIN_COUNTERS, **_router(plain, base), **(_gates(spec) if plain.routing.get("gates") else {})}
    rank = rank_of(scheme, spec.method, site.policy.max_rank)
    upload, each = _upload(plain, up, phase.roles)
    ring = as_ring(_codec(plain, up.size))
    bits = WORD if ring is None else ring.width(plain.expected)
    spending = cost(site, plain.model_dump(), foresight.Work(name, up, settings, examples, plain.expected, bits))
    asked = _ask((site, plain), spec, upload, settings, rank, base.fingerprint.identity)
    asked = replace(
        asked,
        accounted=spending is not None,
        epsilon=None if spending is None else spending.after,
        modules=tuple(e.name for e in up.entries),
    )
    try:
        rules, refused = policy.check(asked, site), None
    except PolicyError as fault:
        rules, refused = tuple(policy.RULES), str(fault)
    uniform = spending is not None and spending.counters is not None
    if spending is not None and spending.counters is not None:
        counters = {key: length for key, length in counters.items() if key in spending.counters}
    weight = f"{min(examples, plain.max_examples)} / the round's largest number of examples, at most 1"
    weight = "every site weighs the same" if uniform else weight
    beside = CODE_BYTES * (Schema(up, Grid(plain.least), train_counters(plain.task_blind)).size - up.size) if plain.masked else 0
    size = asked.upload_bytes + (beside or FLOAT_BYTES * sum(TRAIN_COUNTERS.values()))
    private = tuple(sorted(phase.private & spec.layout.roles))
    lines = tuple(Line(entry.name, entry.role, entry.shape, round(each[entry.role] * entry.size)) for entry in up.entries)
    made = Forecast(name, phase.name, examples, weight, lines, counters, size, str(spending or EPSILON), rules, refused, private)
    return replace(made, masked=plain.masked, cost=spending, scores=_scores(plain, task), tested=shelf.count(name, "test"))


def _nouns(plain: Plain, name: str, base: Base) -> tuple[Task, AdapterSpec, Scheme, TrainSettings]:
    from fedpeft.adapters import make_spec

    task = plain.task(name)
    try:
        scheme: Scheme = config.build(SCHEMES, plain.scheme, "scheme")
    except ValueError as fault:
        raise ConfigError(str(fault)) from None
    return task, make_spec(name, base, plain.adapter_method(), task.head), scheme, plain.settings(name)


def _ask(sides: tuple[SiteConfig, Plain], spec: AdapterSpec, upload: int, settings: TrainSettings, rank: int, identity: str) -> Ask:
    site, plain = sides
    return Ask(
        task=spec.task,
        base=tuple(dict.fromkeys((str(plain.base.get("model", "minilm")), identity))),
        method=type(spec.method).kind,
        rank=rank,
        upload_bytes=upload + flat.HEADER,
        cohort=plain.hidden,
        steps=settings.steps * settings.accumulate,
        secure_aggregation=plain.masked,
        task_blind=plain.task_blind,
        **today(site),
        encoders=tuple(model for model in config.parse(plain.routing, Routing, "routing").encoder if model != OWN),
    )


def _upload(plain: Plain, up: Layout, roles: frozenset[str]) -> tuple[int, dict[str, float]]:
    """The most bytes of values that leave, and of one value of each role."""
    codec = _codec(plain, up.size)
    if isinstance(codec, Ring):
        lanes = Lanes(up, roles & up.roles, codec, np.zeros(0, np.uint8), plain.expected if plain.masked else 1)
        return lanes.bytes(), {role: lanes.width / 8 if role in lanes.roles else CODE_BYTES for role in up.roles}
    most = codec.most(up.size, 1)
    return most, dict.fromkeys(up.roles, most / max(up.size, 1))


def _codec(plain: Plain, size: int) -> Codec:
    """The codec of ``size`` values, which a budget picks where there is one, and which is a ring under masks."""
    if plain.wire.get("budget"):
        return choose(int(plain.wire["budget"]), size, plain.masked, plain.expected)
    try:
        codec: Codec = config.build(CODECS, plain.wire.get("codec", "none"), "wire.codec")
    except ValueError as fault:
        raise ConfigError(str(fault)) from None
    return (as_ring(codec) or codec) if plain.masked else codec


def _router(plain: Plain, base: Base) -> dict[str, int]:
    """Counters of evaluation messages: sums of embeddings and of their products, and histograms of how near they are to the task."""
    settings = config.parse(plain.routing, Routing, "routing")
    width = meta_encoder(settings.encoder, base).width
    found = {"embedding.sum": width, "embedding.count": 1, "cosine.<task>": BINS}
    moments = settings.moments and plain.privacy in ("none", {"kind": "none"})
    found |= {MOMENTS: values_of(width), CLOSENESS: BINS} if moments else {}
    return found | ({NGRAMS: BUCKETS, TEXTED: BINS} if moments and settings.ngrams else {})


def _scores(plain: Plain, task: Task) -> tuple[str, ...]:
    """The metrics whose sums leave where rounds are scored; a mechanism may leave evaluations out."""
    silent = isinstance(plain.privacy, Mapping) and plain.privacy.get("kind") != "none" and not plain.privacy.get("evaluation")
    return () if silent else task.metrics


def _gates(spec: AdapterSpec) -> dict[str, int]:
    """Counters of the message with gates: one per LoRA layer, and histograms of router scores."""
    own = {f"gate.{module}": size for module, size in lora_modules(spec.layout).items()}
    return {**own, "gate.weight": 1, "score.gate": BINS, "score.arrow": BINS}


def as_json(forecasts: list[Forecast]) -> list[dict[str, Any]]:
    """A JSON form, one object per task."""
    return [asdict(one) | {"routing_bytes": one.routing_bytes} for one in forecasts]
