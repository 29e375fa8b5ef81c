"""One task of one round at the site: train or score, and what of it may leave as sums."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError, BaseError, DataError, PolicyError
from fedpeft.privacy.mechanism import protect
from fedpeft.privacy.metric import Metric
from fedpeft.privacy.noise import SecureNoise
from fedpeft.privacy.selftest import check_moved
from fedpeft.routing import counts_of, histogram
from fedpeft.routing.closeness import CLOSENESS, TEXTED, read
from fedpeft.routing.moments import MOMENTS, Measure, halves, sums
from fedpeft.routing.ngrams import NGRAMS, counted, spelled
from fedpeft.schemes import Masks, SiteContext, ifca
from fedpeft.tensors import Tensors
from fedpeft.training import TrainJob, TrainResult
from fedpeft.update import Counters, Update, snap_counters
from fedpeft.wire.spreads import spread_of
from fedpeft.wire.v1.federation_pb2 import Centroid, TaskPlan
from fedpeft_client.personal import Own
from fedpeft_client.plan import Work
from fedpeft_client.privacy import Guard, Steps
from fedpeft_client.secure import NOTHING
from fedpeft_client.sending import Sent, contribution
from fedpeft_client.shelf import Shelf

if TYPE_CHECKING:
    from fedpeft.bases import Base, Encoder


class WrongBase(BaseError):  # noqa: N818 - it says what happened, as its base does
    """The plan is for another base than the site's."""


@dataclass(frozen=True)
class Bench:
    """What a task works with: the warm base, the rows, who guards them, and who hears of progress (task, step); warm ``encoders``."""

    base: Base
    shelf: Shelf
    guard: Guard
    progress: Callable[[str, int], None] = lambda _task, _step: None
    encoders: dict[str, Encoder] = field(default_factory=dict)

    def encoder(self, named: str) -> Encoder:
        """What a plan says embeds rows: the base, or another model, loaded once. Raises `BaseError` when it is not here or another one."""
        from fedpeft.bases import load_encoder

        if named not in self.encoders:
            self.encoders[named] = load_encoder(named, self.base)
        return self.encoders[named]


def check_base(work: Work, base: Base) -> None:
    """Raise `WrongBase` unless the plan is for this site's base, `AdapterError` unless its parts speak of one task.

    That the layout is what the method gives on this base is checked when the adapter is attached.
    """
    identity = base.fingerprint.identity
    if work.spec.base != identity:
        raise WrongBase(
            f"task {work.plan.task!r}: the plan is for base {work.spec.base} ({work.spec.base_model}), this site holds base {identity} "
            f"({base.spec.model}); get the same weights and tokenizer on both sides"
        )
    mine = work.task.name == work.plan.task or ifca.is_cluster(work.plan.task, work.task.name)
    if work.spec.task != work.plan.task or not mine or work.spec.head != work.task.head:
        raise AdapterError(
            f"plan of task {work.plan.task!r}: adapter of {work.spec.task!r} with {len(work.spec.head.labels)} labels, rows of "
            f"{work.task.name!r} with {len(work.task.head.labels)}; a plan speaks of one task"
        )


@dataclass(frozen=True)
class Begin:
    """Where a site's round begins: the adapter with the site's private tensors in place, what the scheme may know, what was kept.

    ``common`` is the adapter as all sites have it, ``steps`` how rows are protected while they are trained on (None: they are not).
    """

    tensors: Tensors
    site: SiteContext
    own: Own
    common: Tensors
    steps: Steps | None = None


def train(work: Work, begin: Begin, bench: Bench, checkpoint: Path) -> tuple[Sent, float, Own]:
    """Train and encode what the scheme contributes; with the seconds that training took, and what the site keeps for itself.

    Raises:
        DataError: no rows, or rows that the task cannot read.
        PolicyError: the scheme cannot train a rank as small as the site's.
        UpdateError: training diverged, or the delta leaves the round's grid.
        PrivacyError: what leaves would not be protected as promised.
    """
    from fedpeft.adapters import attach
    from fedpeft.training import train as run

    data = bench.shelf.encoded(work.task, "train", bench.base)
    examples = len(bench.shelf.rows(work.task.name, "train"))
    job = replace(job_of(work, begin.site), checkpoint=checkpoint, progress=lambda step, _loss: bench.progress(work.plan.task, step))
    with attach(bench.base, work.spec) as live:
        live.load(begin.tensors)
        result = run(live, work.task, data, work.settings, job, None if begin.steps is None else begin.steps.engine)
        after = live.read()
    if work.promise is not None and job.mask is None:
        check_moved(begin.tensors, after, work.trained.roles)
    raw = None if result.gradient is None else Tensors(work.trained, result.gradient).pick(work.phase.roles)
    delta = work.scheme.contribution(begin.tensors, after, work.phase, replace(begin.site, gradient=raw))
    own = begin.own.after(after.pick(work.phase.private), raw)
    counters = {"train.examples": (float(examples),)} if bench.guard.own and work.promise is None else _counters(result, examples)
    bounded = bench.guard.disturb(delta)
    if work.mechanism is not None:
        bounded = Metric.of(begin.common, work.phase.roles).into(bounded)
    sent, own = contribution(work, bounded, (share(examples, work.plan.weight_cap), counters), own, begin.site.name)
    return sent, result.seconds, own


def job_of(work: Work, site: SiteContext) -> TrainJob:
    """The training job of ``work`` at ``site``: its roles, the scheme's mask and correction. Raises `PolicyError` (see `train`)."""
    layout, roles, mask, correction = work.spec.layout, work.trained.roles, None, None
    if isinstance(work.scheme, Masks):
        mask = work.scheme.mask(layout, work.phase, site)
        if mask is None and site.rank is not None:
            raise PolicyError(f"max_rank: scheme {work.scheme.kind} trains more than rank {site.rank} here; raise policy.max_rank")
    if site.control is not None:
        common, own = site.control
        correction = Tensors.zeros(work.trained).patch(common - own).flat
    return TrainJob(roles, work.plan.seed, mask=mask, correction=correction, want_gradient=site.control is not None)


def _counters(result: TrainResult, examples: int) -> Counters:
    return {
        "train.loss": (result.loss_sum, float(result.count)),
        "train.examples": (float(examples),),
        "train.seen": (float(result.examples),),
        "train.tokens": (float(result.tokens),),
    }


def share(examples: int, cap: int) -> float:
    """The site's weight in (0, 1]: its examples up to ``cap``, over ``cap``. Raises `DataError` when it has none."""
    if examples < 1:
        raise DataError("the train split holds no rows; check [data] of the site's file")
    return min(examples, max(cap, 1)) / max(cap, 1)


def evaluate(work: Work, start: Tensors, bench: Bench, base_alone: Callable[[], Counters]) -> tuple[Counters, float]:
    """Counters on the held-out rows under ``start`` and under the base alone, and what the plan wants for the router."""
    from fedpeft.adapters import attach
    from fedpeft.training import evaluate as run

    began = time.monotonic()
    data = bench.shelf.encoded(work.task, "test", bench.base)
    with attach(bench.base, work.spec) as live:
        live.load(start)
        adapter = run(live, work.task, data)
    counters = {f"adapter.{name}": values for name, values in adapter.items()}
    counters |= {f"base.{name}": values for name, values in base_alone().items()}
    counters |= router_counters(work, bench)
    return snap_counters(counters), time.monotonic() - began


def protected(work: Work, counters: Counters) -> Update:
    """``counters`` of an evaluation as one noised vector. Raises `PrivacyError` where the plan's mechanism names others."""
    assert work.mechanism is not None
    return protect(Tensors.zeros(NOTHING), counters, work.mechanism, SecureNoise())


def score_base(work: Work, bench: Bench) -> Counters:
    """Counters on the held-out rows without training: the language model itself, or round 0's fresh classification head."""
    from fedpeft.adapters import attach, initial
    from fedpeft.training import evaluate as run

    data = bench.shelf.encoded(work.task, "test", bench.base)
    if work.spec.head.kind == "lm":
        return work.task.evaluate(bench.base.shell(work.spec.head), data, bench.base)
    with attach(bench.base, work.spec) as live:
        live.load(initial(bench.base, work.spec, work.plan.seed).tensors)
        return run(live, work.task, data)


def router_counters(work: Work, bench: Bench) -> dict[str, tuple[float, ...]]:
    """Sums of the train rows' embeddings and of their products, and histograms of how near they are to what the plan knows of the task."""
    plan = work.plan
    if not (plan.want_embedding or plan.want_moments or plan.want_ngrams or plan.centroids or plan.HasField("own")):
        return {}
    vectors = bench.shelf.vectors(work.task, bench.encoder(plan.encoder))
    counters: dict[str, tuple[float, ...]] = {}
    if plan.want_embedding:
        counters["embedding.sum"] = tuple(vectors.sum(axis=0, dtype=np.float64).tolist())
        counters["embedding.count"] = (float(len(vectors)),)
    if plan.want_moments:
        counters[MOMENTS] = tuple(sums(halves(vectors)[0]).tolist())
    if plan.want_ngrams:
        counters[NGRAMS] = tuple(counted(halves(bench.shelf.texts(work.task))[0]).tolist())
    if plan.HasField("own"):
        counters |= _closeness(plan, vectors, bench.shelf.texts(work.task))
    return counters | _histograms(plan.centroids, vectors)


def _closeness(plan: TaskPlan, vectors: NDArray[np.float32], texts: list[str]) -> dict[str, tuple[float, ...]]:
    measure = Measure(spread_of(plan.own), spread_of(plan.pool))
    known = {CLOSENESS: None} | ({TEXTED: halves(texts)[1]} if spelled(measure) else {})
    return {name: counts_of(read((measure,), halves(vectors)[1], mine)[1][:, 0]) for name, mine in known.items()}


def _histograms(centroids: Iterable[Centroid], vectors: NDArray[np.float32]) -> dict[str, tuple[float, ...]]:
    found = {}
    for centroid in centroids:
        values = np.asarray(centroid.values, np.float32)
        if values.shape != vectors.shape[1:]:
            raise AdapterError(f"centroid of task {centroid.task!r}: {values.size} values, this base embeds in {vectors.shape[1]}")
        found[f"cosine.{centroid.task}"] = histogram(vectors, values / np.float32(max(float(np.linalg.norm(values)), 1e-12)))
    return found
