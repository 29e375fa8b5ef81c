"""Federations of fake sites under client-level privacy, in the clear and behind masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.packing import Schema
from fedpeft.privacy.settings import Distributed
from fedpeft.tensors import Layout
from fedpeft.wire import Envelope
from fedpeft.wire.v1.federation_pb2 import Masking, RoundPlan, RoundReply, TaskPlan, TaskResult
from fedpeft.wire.vector import Vector
from fedpeft_client.answers import Answer
from fedpeft_client.secure import Secure
from fedpeft_coordinator.setup import SecureAggregation

SCORED = {"counters": {"adapter.correct": 50.0, "adapter.count": 100.0}, "evaluation": 4.0}
MANY = {"east": {"area": 12}, "north": {"area": 40}, "south": {"area": 25}, "west": {"area": 7}}


def federation(fake: ModuleType, folder: Path, settings: Any, rounds: int = 2, holdings: Any = None, **extra: Any) -> Any:
    made = fake.setup(rounds=rounds, server="sgd", tasks=("area",), **extra)
    every = 1 if getattr(settings, "evaluation", 0) else 0
    sites = fake.sites({name: {"area": holds["area"]} for name, holds in (holdings or MANY).items()})
    return fake.Federation(folder, replace(made, privacy=settings, evaluate_every=every), sites)


@dataclass
class Hidden:
    """A fake site whose protected vectors leave under masks."""

    site: Any
    folder: Path

    def __call__(self, envelope: Envelope) -> Envelope:
        if envelope.kind == "hello":
            return self.site(envelope)
        asked, secure = envelope.open(RoundPlan), Secure(self.site.name, self.folder / self.site.name)
        (plan,) = asked.tasks
        answer = Answer(secure.answer(asked, plan)) if envelope.kind == "secure" else self._masked(envelope, asked, plan, secure)
        reply = RoundReply(site=self.site.name, run=asked.run, round=asked.round, results=[answer.result])
        return Envelope.of("reply", reply, {plan.task: answer.array} if answer.array else {})

    def _masked(self, envelope: Envelope, asked: RoundPlan, plan: TaskPlan, secure: Secure) -> Answer:
        plain = self.site(envelope)
        (result,) = plain.open(RoundReply).results
        assert secure.instance(asked, plan, envelope.kind) is not None
        if result.status != TaskResult.STATUS_OK:
            return Answer(result)
        answer, module = Answer(result, plain.arrays.get(plan.task, b"")), _module(self.site)
        if plan.masking.step == Masking.STEP_KEYS:
            return secure.keyed(asked, plan, answer)
        travels = self.site.layout.subset(plan.roles) if envelope.kind == "train" else Layout(())
        mechanism = module.mechanism(plan)
        return secure.masked(asked, plan, answer, Vector(Schema(mechanism.layout(travels), mechanism.grid, {})))


def _module(site: Any) -> Any:
    import sys

    return sys.modules[type(site).__module__]


def hidden(fake: ModuleType, folder: Path, settings: Any, **extra: Any) -> Any:
    made = federation(fake, folder, settings, min_sites=3, **extra)
    made.setup = replace(made.setup, secure=SecureAggregation(full=isinstance(settings, Distributed)))
    made.sites = {name: Hidden(site, folder / "sites") for name, site in made.sites.items()}
    return made


def ledger(folder: Path) -> Ledger:
    return Ledger(folder / "ledger")
