"""A federation of fake sites whose vectors leave under masks, its twin in the clear, and what a lying coordinator says."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fedpeft.errors import FedpeftError
from fedpeft.privacy.packing import Schema
from fedpeft.tensors import Layout
from fedpeft.update import TRAIN_COUNTERS, Grid
from fedpeft.wire import Envelope, flat, masking
from fedpeft.wire.v1.federation_pb2 import Masking, RoundPlan, RoundReply, TaskResult
from fedpeft.wire.vector import Vector
from fedpeft_client.answers import Answer
from fedpeft_client.secure import Secure
from fedpeft_coordinator.setup import SecureAggregation
from fedpeft_coordinator.transport import Failure

MANY = {
    "east": {"area": 12, "kind": 9},
    "north": {"area": 40, "kind": 10},
    "south": {"area": 25, "kind": 3},
    "west": {"kind": 30, "area": 7},
}
STEPS = {"keys": 1, "shares": 2, "vector": 3, "agree": 4, "reveal": 5}


@dataclass
class Guarded:
    """A fake site behind a real `Secure`; ``left`` are the plain and the sent arrays of its vectors."""

    site: Any
    folder: Path
    left: list[tuple[str, np.ndarray, np.ndarray]] = field(default_factory=list)

    def __call__(self, envelope: Envelope) -> Envelope:
        if envelope.kind == "hello":
            return self.site(envelope)
        asked = envelope.open(RoundPlan)
        plans = {task.task: task for task in asked.tasks}
        secure, arrays = Secure(self.site.name, self.folder / self.site.name), {}
        if envelope.kind == "secure":
            return self._reply(asked, [self._try(plan.task, lambda plan=plan: Answer(secure.answer(asked, plan))) for plan in asked.tasks])
        plain = self.site(envelope)
        given = []
        for result in plain.open(RoundReply).results:
            answer = Answer(result, plain.arrays.get(result.task, b""))
            if result.status == TaskResult.STATUS_OK:
                answer = self._try(result.task, lambda a=answer: self._mask(secure, asked, plans[a.result.task], envelope.kind, a))
            given.append(answer)
            arrays |= {result.task: answer.array} if answer.array else {}
        return self._reply(asked, given, arrays)

    def _mask(self, secure: Secure, asked: RoundPlan, plan: Any, kind: str, answer: Answer) -> Answer:
        instance = secure.instance(asked, plan, kind)
        assert instance is not None
        assert plan.secure_aggregation
        if plan.masking.step == Masking.STEP_KEYS:
            return secure.keyed(asked, plan, answer)
        vector = Vector(Schema(Layout(()), Grid(len(instance.members)), masking.counters_of(plan.masking.counters)))
        if answer.array:
            fingerprint = answer.result.layout_fingerprint
            layout = next(self.site.layout.subset(r) for r in ({"B", "head"}, {"A", "head"}, {"A", "B", "head"})
                          if self.site.layout.subset(r).fingerprint == fingerprint)  # fmt: skip
            schema = Schema(layout, Grid(plan.grid_sites, plan.grid_reach), TRAIN_COUNTERS)
            vector = Vector(schema, self.site.lanes[plan.task] if plan.codec_json else None)
        sent = secure.masked(asked, plan, answer, vector)
        if answer.array:
            self.left.append((plan.task, flat.unpack(answer.array)[1], flat.unpack(sent.array)[1]))
        return sent

    def _try(self, task: str, work: Callable[[], Answer]) -> Answer:
        try:
            return work()
        except FedpeftError as fault:
            return Answer(TaskResult(task=task, status=TaskResult.STATUS_REFUSED, reason=str(fault)))

    def _reply(self, asked: RoundPlan, answers: list[Answer], arrays: dict[str, bytes] | None = None) -> Envelope:
        reply = RoundReply(site=self.site.name, run=asked.run, round=asked.round, base_loads=1, results=[one.result for one in answers])
        return Envelope.of("reply", reply, arrays or {})


def masked(fake: ModuleType, folder: Path, holdings: dict[str, dict[str, int]] | None = None, rounds: int = 3, **extra: Any) -> Any:
    settings = SecureAggregation(**extra.pop("secure", {}))
    setup = replace(fake.setup(rounds=rounds, tasks=("area", "kind"), min_sites=3, **extra), secure=settings)
    sites = {name: Guarded(site, folder / "sites") for name, site in fake.sites(holdings or MANY).items()}
    return fake.Federation(folder, setup, sites)


def clear(fake: ModuleType, folder: Path, holdings: dict[str, dict[str, int]] | None = None, rounds: int = 3, **extra: Any) -> Any:
    setup = fake.setup(rounds=rounds, tasks=("area", "kind"), min_sites=3, **extra)
    return fake.Federation(folder, setup, fake.sites(holdings or MANY))


def step_of(request: Envelope) -> str:
    """The step of secure aggregation that ``request`` carries, with the work that it comes beside."""
    if request.kind == "hello":
        return ""
    step = next((name for name, number in STEPS.items() if number == request.open(RoundPlan).tasks[0].masking.step), "")
    return f"{request.kind} {step}"


def bend(federation: Any, name: str, change: Callable[[Any], None]) -> None:
    """Let the coordinator tell site ``name`` something else than the rest."""
    site = federation.sites[name]

    def bent(envelope: Envelope) -> Envelope:
        if envelope.kind == "hello":
            return site(envelope)
        asked = envelope.open(RoundPlan)
        for task in asked.tasks:
            change(task)
        return site(Envelope.of(envelope.kind, asked, envelope.arrays))

    federation.sites[name] = bent


def spoil(federation: Any, name: str, step: str, change: Callable[[Envelope], Envelope]) -> None:
    """Let ``change`` go over what site ``name`` replies in ``step`` (as `step_of` says)."""
    site = federation.sites[name]
    federation.sites[name] = lambda envelope: change(site(envelope)) if step_of(envelope) == step else site(envelope)


def busy(names: Collection[str], step: str) -> Callable[[str, Envelope], Failure | None]:
    """The sites ``names`` fail in ``step``, or in all steps of what it begins with."""
    return lambda site, request: Failure("is busy") if site in names and step_of(request).startswith(step) else None
