"""The Worker: answers the coordinator's messages with warm rows and a warm base; knows nothing of Flower."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING

from fedpeft import bases
from fedpeft.errors import DataError, FedpeftError, LinkError
from fedpeft.privacy.ledger import Kind
from fedpeft.privacy.promise import Single
from fedpeft.tensors import Tensors
from fedpeft.update import Counters
from fedpeft.wire import Envelope, flat
from fedpeft.wire.v1.federation_pb2 import Capabilities, Hello, Holding, Masking, RoundPlan, RoundReply, TaskPlan, TaskResult
from fedpeft_client import answers, audit, beginning, blind, choosing, gates, plan, policy, rounds
from fedpeft_client.answers import Answer
from fedpeft_client.config import SiteConfig
from fedpeft_client.faults import failure
from fedpeft_client.personal import Personal
from fedpeft_client.plan import Work
from fedpeft_client.privacy import Guard, Spending, Steps
from fedpeft_client.rounds import Begin, Bench
from fedpeft_client.secure import Secure
from fedpeft_client.sending import vector_of
from fedpeft_client.shelf import Shelf, Split
from fedpeft_client.store import Held, Store, scratch, sweep

if TYPE_CHECKING:
    from fedpeft.bases import Base, BaseSpec, Encoder
    from fedpeft.privacy.secagg import Instance

KEPT_PER_TASK = 8
"""How many adapters, answers and half-done rounds stay on disk for each task: the youngest of each kind."""
ASKED = ("train", "evaluate", "secure", "choose")
SPLITS: dict[str, tuple[Split, ...]] = {"train": ("train",), "evaluate": ("train", "test")}


@dataclass(frozen=True)
class Done:
    """An answer about to leave, the work it answers when that could be read, and what its task has then spent where it is charged."""

    answer: Answer
    work: Work | None = None
    repeated: bool = False
    epsilon: float | None = None

    @property
    def tensors(self) -> dict[str, int]:
        """Bytes of values by role; of a codec's message, each role's share by number of values."""
        if self.work is None or not self.answer.array or not self.answer.result.layout_fingerprint:
            return {}
        up, lanes = self.work.sent, self.work.lanes
        if lanes is not None and not self.work.plan.HasField("masking"):
            lanes = lanes.alone
        each = 4.0 if self.work.codec is None else (len(self.answer.array) - flat.HEADER) / max(up.size, 1)
        narrow = {role: lanes.width / 8 for role in lanes.roles} if lanes is not None else {}
        return {role: round(narrow.get(role, each) * (span.stop - span.start)) for role, span in up.role_spans.items()}


@dataclass
class Worker:
    """One site. `handle` is called with one message at a time and never raises for the fault of a single task.

    ``progress`` hears (what, step) while work goes on; the supervisor's watchdog lives on it. ``broken`` is set once the
    device has failed in a way that only a new process cures. ``load`` brings the base where several sites of one process share it;
    ``faults`` are why tasks were not answered when last asked for, in words for this site alone.
    """

    site: SiteConfig
    progress: Callable[[str, int], None] = lambda _what, _step: None
    instance: str = field(default_factory=lambda: uuid.uuid4().hex)
    load: Callable[[BaseSpec, str], Base] = bases.load_base
    faults: dict[str, str] = field(default_factory=dict)
    _scores: dict[tuple[str, str, int], Counters] = field(default_factory=dict)
    _encoders: dict[str, Encoder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shelf = Shelf(self.site)
        self.keep = KEPT_PER_TASK * len(self.site.data)
        sweep(self.site.state)
        self.adapters = Store(self.site.state / "adapters", self.keep)
        self.answers = Store(self.site.state / "answers", self.keep)
        self.personal = Personal(Store(self.site.state / "personal", self.keep))
        self.secure = Secure(self.site.name, self.site.state, self.site.peers, self.site.policy.min_cohort)
        self.guard = Guard(self.site.name, self.site.policy, self.site.state / "ledger")
        self.held = Held(self.site.state / "held.json")
        self.broken = False

    @property
    def base_loads(self) -> int:
        """How often this process loaded a base: 1 once the worker is warm."""
        return bases.LOADS

    @cached_property
    def base(self) -> Base:
        """The site's base, loaded when first needed and kept. Raises `BaseError`."""
        import torch

        if self.site.threads:
            torch.set_num_threads(self.site.threads)
        if self.site.gpu_share < 1 and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(self.site.gpu_share)
        self.progress("loading the base", 0)
        return self.load(self.site.base.spec(), self.site.device)

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer one message.

        Raises:
            LinkError: the message is of a kind that sites do not answer.
            UpdateError: the message's body is malformed.
        """
        if envelope.kind == "hello":
            return self._hello(envelope.open(Hello))
        if envelope.kind not in ASKED:
            raise LinkError(
                f"message of kind {envelope.kind!r}: a site answers 'hello', {', '.join(map(repr, ASKED))}; do both sides run one version?"
            )
        return self._round(envelope, envelope.open(RoundPlan))

    def _hello(self, hello: Hello) -> Envelope:
        asked = [task for task in sorted(self.site.allowed_tasks) if task in hello.tasks or not hello.tasks]
        hides = hello.task_blind or self.site.policy.require_task_blind
        holdings = blind.holdings(hello) if hides else [held for task in asked if (held := self._holding(task)) is not None]
        return Envelope.of(
            "reply",
            Capabilities(
                site=self.site.name,
                version=version("fedpeft"),
                holdings=holdings,
                base_identity=self.base.fingerprint.identity,
                quantization=self.base.fingerprint.quantization,
                device=str(self.base.device),
                base_loads=self.base_loads,
                instance=self.instance,
            ),
        )

    def _holding(self, task: str) -> Holding | None:
        try:
            train, test = self.shelf.count(task, "train"), self.shelf.count(task, "test")
        except DataError as fault:
            failure(task, fault, self.faults)  # it is left out
            return None
        digest = self.held.get(task)
        return Holding(task=task, train_examples=train, test_examples=test, adapter_digest=digest if digest in self.adapters else "")

    def _round(self, envelope: Envelope, asked: RoundPlan) -> Envelope:
        given = self._choose(envelope, asked) if envelope.kind == "choose" else [self._task(envelope, asked, task) for task in asked.tasks]
        reply = RoundReply(
            site=self.site.name,
            run=asked.run,
            round=asked.round,
            results=[answer.result for answer in given],
            base_loads=self.base_loads,
            instance=self.instance,
        )
        return Envelope.of("reply", reply, {answer.result.task: answer.array for answer in given if answer.array})

    def _choose(self, envelope: Envelope, asked: RoundPlan) -> list[Answer]:
        given = choosing.answers_to(asked, self.site, lambda work: beginning.start(work, envelope, self.adapters), self._bench)
        for task, answer in zip(asked.tasks, given, strict=True):
            self._record(envelope.kind, asked, task, Done(answer))
        return given

    def _task(self, envelope: Envelope, asked: RoundPlan, task: TaskPlan) -> Answer:
        """Answer one task; whatever goes wrong is its named failure and nobody else's."""
        try:
            done = self._answer(envelope, asked, task)
            self._record(envelope.kind, asked, task, done)
            self.faults.pop(task.task, None)
        except Exception as fault:  # noqa: BLE001 - the edge between tasks: one task's fault must not take the others down
            done = Done(failure(task.task, fault, self.faults))
            self.broken = self.broken or type(fault).__name__ == "AcceleratorError"
            with suppress(FedpeftError):
                self._record(envelope.kind, asked, task, done)
        return done.answer

    def _answer(self, envelope: Envelope, asked: RoundPlan, task: TaskPlan) -> Done:
        if envelope.kind == "secure":
            return Done(Answer(self.secure.answer(asked, task)))
        if task.task_blind and not blind.holds(self.shelf, task.task, SPLITS[envelope.kind]):
            return self._blank(envelope, asked, task)
        work = plan.read(asked, task, scores=envelope.kind == "evaluate")
        instance = self.secure.instance(asked, task, envelope.kind)
        wanted = plan.ask(work, self.base.fingerprint.identity, self.site, instance)
        policy.check(wanted, self.site)
        rounds.check_base(work, self.base)
        self.guard.check(work.promise, instance, work.answer)
        self.progress(task.task, 0)
        start = beginning.start(work, envelope, self.adapters)
        self.held.put(task.task, task.adapter_digest)
        run, trains = (asked.federation, asked.run), envelope.kind == "train"
        own = self.personal.at(run, task.task, task.counted_round)
        begin = own.patch(start, work.phase)
        key = plan.answer_key(self.site, envelope.kind, asked, work, self._local(envelope.kind, work.task.name) + own.digest)
        steps = self._steps(work) if trains else None
        spending = self._foreseen(asked, work, key, steps)
        policy.check(replace(wanted, epsilon=spending.epsilon), self.site)
        kept = self.answers.get(key)
        if kept is not None:
            return self._leaving(asked, Done(Answer.from_bytes(kept), work, repeated=True), instance, spending)
        if trains:
            answer = self._train(work, Begin(begin, beginning.context(work, envelope, self.site, own), own, start, steps), run, key)
        else:
            answer = self._evaluate(work, begin)
        self.answers.put(key, answer.to_bytes())
        shutil.rmtree(self.site.state / "checkpoints" / key, ignore_errors=True)
        return self._leaving(asked, Done(answer, work), instance, spending)

    def _blank(self, envelope: Envelope, asked: RoundPlan, task: TaskPlan) -> Done:
        """Zeros for a task that this site does not hold, once everything is as it must be for one that it holds."""
        work, instance = plan.read(asked, task, scores=envelope.kind == "evaluate"), self.secure.instance(asked, task, envelope.kind)
        assert instance is not None
        policy.check(plan.ask(work, self.base.fingerprint.identity, self.site, instance), self.site)
        rounds.check_base(work, self.base)
        beginning.start(work, envelope, self.adapters)
        self.held.put(task.task, task.adapter_digest)
        answer = blind.blank(work, self._bench.encoder)
        keys = task.masking.step == Masking.STEP_KEYS
        sent = self.secure.keyed(asked, task, answer) if keys else self.secure.masked(asked, task, answer, vector_of(work, instance))
        return Done(sent, work)

    def _leaving(self, asked: RoundPlan, done: Done, instance: Instance | None, spending: Spending) -> Done:
        """``done`` as it leaves: in the clear, as keys alone, or under the masks of ``instance``; charged unless its values stay."""
        work, answer = done.work, done.answer
        assert work is not None
        if instance is not None and work.plan.masking.step == Masking.STEP_KEYS:
            return replace(done, answer=self.secure.keyed(asked, work.plan, answer))
        spent = self.guard.spend(spending)
        answer.result.epsilon = spent
        if instance is not None:
            answer = self.secure.masked(asked, work.plan, answer, vector_of(work, instance))
        elif answer.array and work.lanes is not None:
            answer = answers.narrowed(answer, work.lanes.alone)
        return replace(done, answer=answer, epsilon=spent if spending.charges else None)

    def _steps(self, work: Work) -> Steps | None:
        """How DP-SGD protects the rows of ``work`` where its plan asks for it."""
        if not isinstance(work.promise, Single):
            return None
        return Steps.of(work.promise, work.settings, len(self.shelf.encoded(work.task, "train", self.base)))

    def _foreseen(self, asked: RoundPlan, work: Work, key: str, steps: Steps | None) -> Spending:
        kind: Kind = "adapter" if not work.scores else "centroid" if work.plan.want_embedding else "metrics"
        name = f"{asked.run}/{asked.round}/{work.plan.task}/{kind}/{key[:16]}"
        return self.guard.foresee(name, work.plan.task, kind, self.guard.events(work.promise, work.answer, steps))

    def _local(self, kind: str, task: str) -> str:
        """What of this site, beside the plan, determines an answer."""
        rows = [self.shelf.digest(task, split) for split in SPLITS[kind]]
        return " ".join((*rows, self.base.fingerprint.quantization, str(self.base.spec.max_tokens)))

    def _train(self, work: Work, begin: Begin, run: tuple[str, str], key: str) -> Answer:
        checkpoint = scratch(self.site.state / "checkpoints", key, self.keep)
        sent, seconds, own = rounds.train(work, begin, self._bench, checkpoint)
        self.personal.keep(run, work.plan.task, (work.plan.counted_round, work.round), own)
        return answers.of_update(work.plan.task, sent.update, seconds, work.plan.adapter_digest, sent.message)

    def _evaluate(self, work: Work, start: Tensors) -> Answer:
        self.guard.check_scores(work.promise)
        counters, seconds = gates.evaluate(work, start, self._bench, lambda: self._base_alone(work))
        if work.mechanism is not None:
            return answers.of_update(work.plan.task, rounds.protected(work, counters), seconds, work.plan.adapter_digest)
        return answers.of_counters(work.plan.task, counters, seconds, work.plan.adapter_digest)

    def _base_alone(self, work: Work) -> Counters:
        key = (work.plan.task_json, work.spec.schema, work.plan.seed)
        if key not in self._scores:
            self._scores[key] = rounds.score_base(work, self._bench)
        return self._scores[key]

    @property
    def _bench(self) -> Bench:
        return Bench(self.base, self.shelf, self.guard, self.progress, self._encoders)

    def _record(self, kind: str, asked: RoundPlan, task: TaskPlan, done: Done) -> None:
        result = done.answer.result
        status = TaskResult.Status.Name(result.status).removeprefix("STATUS_").lower()
        left = audit.Departure(
            *(asked.federation, asked.round, kind, result.task),
            outcome=f"{status}: {result.reason}" if result.reason else status,
            tensors=done.tensors,
            counters=tuple(sorted(result.counters)),
            weight=result.weight,
            bytes=done.answer.size,
            digest=done.answer.digest,
            repeated=done.repeated,
            masked=audit.masked_step(task),
            protected="" if done.work is None else self.guard.describe(done.work.promise),
            epsilon=done.epsilon,
        )
        audit.record(self.site.state / "audit.jsonl", left)
