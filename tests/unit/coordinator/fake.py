"""A federation without models: pure numpy sites that answer real plans, for the in-memory transport."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fedpeft import config
from fedpeft.privacy import promise
from fedpeft.privacy.mechanism import Mechanism, protect
from fedpeft.privacy.metric import Metric
from fedpeft.privacy.noise import SecureNoise
from fedpeft.routing.closeness import CLOSENESS, TEXTED
from fedpeft.routing.moments import BUCKETS, MOMENTS
from fedpeft.routing.ngrams import NGRAMS
from fedpeft.schemes import SCHEMES, SERVER_OPTIMIZERS, Masks, Phase, Scheme, SiteContext
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Grid, Update
from fedpeft.wire import Envelope, flat
from fedpeft.wire.codecs import CODECS, Lanes, Ring, hear, receive, send
from fedpeft.wire.envelope import control_key
from fedpeft.wire.v1.federation_pb2 import Capabilities, Hello, Holding, RoundPlan, RoundReply, TaskPlan, TaskResult
from fedpeft_client.personal import Own
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.rounds import Coordinator
from fedpeft_coordinator.setup import Limits, Setup, TaskSetup
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.transport_memory import MemoryTransport

LAYOUT = Layout.of([Entry("A", "x.lora_A", (2, 5)), Entry("B", "x.lora_B", (5, 2)), Entry("head", "classifier.weight", (3, 4))])
TASKS = ("area", "kind", "thing")
HOLDINGS = {"north": {"area": 40, "kind": 10}, "south": {"area": 25}, "west": {"kind": 30, "area": 7}}


def start(task: str, layout: Layout = LAYOUT) -> Tensors:
    """Round 0 as LoRA has it: A random, B zero."""
    rng = np.random.default_rng(sum(map(ord, task)))
    values = Tensors(layout, rng.normal(size=layout.size).astype(np.float32))
    return values.patch(Tensors.zeros(layout.subset({"B", "B2"})))


def goal(site: str, task: str, layout: Layout = LAYOUT) -> np.ndarray:
    return np.random.default_rng(sum(map(ord, site + task))).normal(size=layout.size).astype(np.float32)


@dataclass
class Site:
    """Moves by ``pull`` of the way to its own goal; keeps adapters by digest, and its own tensors by round, as a real site does."""

    name: str
    holds: dict[str, int]
    kept: dict[str, Tensors] = field(default_factory=dict)
    have: dict[str, str] = field(default_factory=dict)
    asked: list[Envelope] = field(default_factory=list)
    twist: Callable[[TaskResult, dict[str, bytes]], None] = lambda _result, _arrays: None
    identity: str = ""
    layout: Layout = LAYOUT
    rank: int | None = None
    pull: float = 0.25
    own: dict[tuple[str, int], Own] = field(default_factory=dict)
    lanes: dict[str, Lanes] = field(default_factory=dict)
    instance: str = ""

    def __call__(self, envelope: Envelope) -> Envelope:
        if envelope.kind == "hello":
            tasks = envelope.open(Hello).tasks or list(self.holds)
            held = [
                Holding(task=t, train_examples=n, test_examples=n, adapter_digest=self.have.get(t, ""))
                for t, n in self.holds.items()
                if t in tasks
            ]
            return Envelope.of(
                "reply", Capabilities(site=self.name, holdings=held, base_identity=self.identity, base_loads=1, instance=self.instance)
            )
        self.asked.append(envelope)
        plan, arrays = envelope.open(RoundPlan), {}
        reply = RoundReply(site=self.name, run=plan.run, round=plan.round, base_loads=1)
        for task in plan.tasks:
            result = self._answer(envelope, plan, task, arrays)
            self.twist(result, arrays)
            reply.results.append(result)
        return Envelope.of("reply", reply, arrays)

    def _answer(self, envelope: Envelope, plan: RoundPlan, task: TaskPlan, arrays: dict[str, bytes]) -> TaskResult:
        begin = self._begin(envelope, task)
        if begin is None:
            return TaskResult(task=task.task, status=TaskResult.STATUS_MISSING_VERSION, reason="not here")
        if envelope.kind == "evaluate":
            result = TaskResult(task=task.task, status=TaskResult.STATUS_OK, adapter_digest=task.adapter_digest)
            if task.privacy_json:
                return self._sent(result, protect(Tensors.zeros(Layout(())), self._scores(begin, task), mechanism(task), NOISE), arrays)
            for name, values in self._scores(begin, task).items():
                result.counters[name].values.extend(values)
            return result
        scheme: Scheme = config.build(SCHEMES, json.loads(task.scheme_json), "scheme")
        delta = self._train(scheme, task, begin, self._context(envelope, task))
        if task.privacy_json:
            delta = Metric.of(begin, frozenset(task.roles)).into(delta)
            result = TaskResult(task=task.task, status=TaskResult.STATUS_OK, adapter_digest=task.adapter_digest)
            return self._sent(result, protect(delta, {"train.loss": (2.5, 2.0)}, mechanism(task), NOISE), arrays)
        weight = min(self.holds[task.task], task.weight_cap) / task.weight_cap
        update, values = self._written(task, delta, weight)
        arrays[task.task] = flat.pack(update.layout.fingerprint, values)
        result = TaskResult(
            task=task.task,
            status=TaskResult.STATUS_OK,
            weight=update.weight,
            layout_fingerprint=update.layout.fingerprint,
            adapter_digest=task.adapter_digest,
        )
        for name, values in update.counters.items():
            result.counters[name].values.extend(values)
        return result

    @staticmethod
    def _sent(result: TaskResult, update: Update, arrays: dict[str, bytes]) -> TaskResult:
        """A protected vector as it travels: one array, the weight of everybody."""
        arrays[result.task] = flat.pack(update.layout.fingerprint, update.codes)
        result.weight, result.layout_fingerprint = update.weight, update.layout.fingerprint
        return result

    def _written(self, task: TaskPlan, delta: Tensors, weight: float) -> tuple[Update, np.ndarray]:
        """The update as it is heard, and what travels in the clear; what a codec loses stays for the next round."""
        loss, grid = {"train.loss": (2.5, 2.0)}, Grid(task.grid_sites, task.grid_reach)
        if not task.codec_json:
            update = Update.encode(delta, weight, loss, grid)
            return update, update.codes
        codec = config.build(CODECS, json.loads(task.codec_json), "codec")
        residual = self._kept(task).residual(delta.layout)
        if isinstance(codec, Ring):
            lanes = self.lanes[task.task] = Lanes.told(delta.layout, task.roles, codec, task.scales, grid)
            update, lost = lanes.send(Update.encode(delta + residual, weight, loss, grid), None)
            values = update.codes if task.HasField("masking") else lanes.alone.write(lanes.shrink(update.codes))
        else:
            message, lost = send(codec, delta, residual, None)
            update = Update.encode(receive(codec, message, delta), weight, loss, grid)
            values = np.frombuffer(message, np.uint8)
        own = self.own.get((task.task, task.task_round), self._kept(task))
        self.own[task.task, task.task_round] = own.with_residual(lost)
        return update, values

    def _kept(self, task: TaskPlan) -> Own:
        """What was kept after the last round that counted, however often this one is asked for."""
        before = [number for name, number in self.own if name == task.task and number <= task.counted_round]
        return self.own[task.task, max(before)] if before else Own()

    def _context(self, envelope: Envelope, task: TaskPlan) -> SiteContext:
        control = None
        if task.control_digest:
            layout = self.layout.subset(task.roles)
            common = Tensors(layout, envelope.array(control_key(task.task), layout.fingerprint).astype(np.float32))
            assert common.digest == task.control_digest
            control = (common, self._kept(task).control(layout))
        return SiteContext(task.seed, self.name, self.rank, control)

    def _train(self, scheme: Scheme, task: TaskPlan, begin: Tensors, site: SiteContext) -> Tensors:
        phase = scheme.phase(task.task_round, self.layout)
        assert sorted(phase.roles) == sorted(task.roles)
        begin = self._kept(task).patch(begin, phase)
        gradient = begin.flat - goal(self.name, task.task, self.layout)
        step = gradient if site.control is None else gradient + _spread(self.layout, site.control[0] - site.control[1])
        moved = Tensors(self.layout, begin.flat - np.float32(self.pull) * step + np.float32(task.seed % 7) / 1000)
        after = begin.patch(self._where(scheme, phase, begin, moved, site))
        raw = None if site.control is None else Tensors(self.layout, gradient).pick(phase.roles)
        self.own[task.task, task.task_round] = self._kept(task).after(after.pick(phase.private), raw)
        return scheme.contribution(begin, after, phase, replace(site, gradient=raw))

    def _where(self, scheme: Scheme, phase: Phase, begin: Tensors, moved: Tensors, site: SiteContext) -> Tensors:
        """The trained roles as moved, but for what the scheme's mask holds back."""
        mask = scheme.mask(self.layout, phase, site) if isinstance(scheme, Masks) else None
        old, new = begin.pick(phase.trains), moved.pick(phase.trains)
        return new if mask is None else Tensors(new.layout, np.where(mask, new.flat, old.flat))

    def _scores(self, begin: Tensors, task: TaskPlan) -> dict[str, tuple[float, ...]]:
        found = {
            "adapter.correct": (float(round(begin.norm())),),
            "adapter.count": (100.0,),
            "base.correct": (1.0,),
            "base.count": (100.0,),
            "adapter.loss": (100.0 * float(np.sum((begin.flat - goal(self.name, task.task, self.layout)) ** 2)),),
        }
        if task.want_embedding:
            found |= {"embedding.sum": (3.0, 4.0), "embedding.count": (5.0,)}
        if task.want_moments:
            found[MOMENTS] = (5.0, 3.0, 4.0, 2.5, 2.0, 3.5)
        if task.want_ngrams:
            found[NGRAMS] = (1.0, *(0.0,) * (BUCKETS - 1))
        if task.HasField("own"):
            found |= dict.fromkeys((CLOSENESS, TEXTED) if task.own.ngrams else (CLOSENESS,), tuple(float(i) for i in range(64)))
        return found | {f"cosine.{c.task}": tuple(float(i) for i in range(64)) for c in task.centroids}

    def _begin(self, envelope: Envelope, task: TaskPlan) -> Tensors | None:
        if task.adapter_digest not in self.kept:
            layout = self.layout.subset(task.down_roles) if task.down_roles else self.layout
            array = envelope.array(task.task, layout.fingerprint)
            if task.previous_digest and task.previous_digest not in self.kept:
                return None
            if task.down_codec_json:
                codec = config.build(CODECS, json.loads(task.down_codec_json), "codec")
                part = hear(codec, self.kept[task.previous_digest].pick(layout.roles), array.data)
            else:
                part = Tensors(layout, array.astype(np.float32))
            whole = self.kept[task.previous_digest].patch(part) if task.previous_digest else part
            assert whole.digest == task.adapter_digest
            self.kept[whole.digest] = whole
        self.have[task.task] = task.adapter_digest
        return self.kept[task.adapter_digest]


NOISE = SecureNoise()


def mechanism(task: TaskPlan) -> Mechanism:
    """How the plan wants the site's vector bounded and noised."""
    promised = promise.loads(task.privacy_json)
    assert isinstance(promised, promise.Whole)
    return promised.mechanism


def _spread(layout: Layout, part: Tensors) -> np.ndarray:
    return Tensors.zeros(layout).patch(part).flat


def setup(
    rounds: int = 4,
    scheme: str | dict[str, object] = "alternating",
    server: str = "adam",
    tasks: tuple[str, ...] = TASKS,
    layout: Layout = LAYOUT,
    **extra: object,
) -> Setup:
    limits = Limits(deadline=2.0, retries=2, **extra)  # type: ignore[arg-type]
    made = {name: task_setup(name, layout) for name in tasks}
    built: Scheme = config.build(SCHEMES, scheme, "scheme")
    return Setup(
        name="fake",
        seed=7,
        rounds=rounds,
        tasks=made,
        scheme=built,
        scheme_json=json.dumps(config.describe(built)),
        server=SERVER_OPTIMIZERS[server](),
        limits=limits,
        evaluate_every=2,
        facts={"seed": 7, "scheme": scheme},
    )


def task_setup(name: str, layout: Layout = LAYOUT) -> TaskSetup:
    return TaskSetup(
        name, layout, json.dumps({"kind": "classification", "name": name}), "{}", "{}", lambda: start(name, layout), 11,
        lambda counters: {"accuracy": counters["correct"][0] / counters["count"][0]} if any(counters.get("count", ())) else {},
        lambda _role: 1.0, {"adapter.correct": 1, "adapter.count": 1, "embedding.sum": 2, "embedding.count": 1, f"cosine.{name}": 64},
    )  # fmt: skip


def sites(holdings: dict[str, dict[str, int]] | None = None, layout: Layout = LAYOUT) -> dict[str, Site]:
    return {name: Site(name, dict(holds), layout=layout) for name, holds in (holdings or HOLDINGS).items()}


@dataclass
class Federation:
    """A coordinator over in-memory sites, that can be opened again on the same folder."""

    folder: Path
    setup: Setup
    sites: dict[str, Site]
    events: list[dict[str, object]] = field(default_factory=list)
    published: list[tuple[str, str, object]] = field(default_factory=list)
    url: str = ""

    def open(self, **transport: object) -> Coordinator:
        network = MemoryTransport(dict(self.sites), Hello(tasks=list(self.setup.tasks)), **transport)  # type: ignore[arg-type]
        journal = Journal(self.url or f"sqlite:///{self.folder / 'journal.sqlite'}")
        return Coordinator(self.setup, journal, Store(self.folder / "blobs"), network, Events(None, [self.events.append]), self._publish)

    def _publish(self, task: TaskSetup, tensors: Tensors, release: object) -> str:
        self.published.append((task.name, tensors.digest, release))
        return f"sha256:{tensors.digest}"

    def final(self) -> dict[str, str]:
        last = Journal(self.url or f"sqlite:///{self.folder / 'journal.sqlite'}").last()
        assert last is not None
        return {name: row.current for name, row in last.tasks.items()}

    def named(self, event: str) -> list[dict[str, object]]:
        return [row for row in self.events if row["event"] == event]


def slow(site: Site, seconds: float) -> Site:
    def wait(_result: TaskResult, _arrays: dict[str, bytes]) -> None:
        time.sleep(seconds)

    return replace(site, twist=wait)
