"""The site's half of masked sums: its machines on disk, what it signed, and answers that leave under a mask."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from fedpeft.errors import PolicyError, PrivacyError
from fedpeft.privacy.packing import Schema
from fedpeft.privacy.secagg import PURPOSE, Bundle, Instance, Member
from fedpeft.signing import Keys
from fedpeft.tensors import Layout
from fedpeft.update import HOLDERS, Counters, Update
from fedpeft.wire import flat, masking
from fedpeft.wire.v1.federation_pb2 import Masked, Masking, RoundPlan, TaskPlan, TaskResult
from fedpeft.wire.vector import Vector
from fedpeft_client.answers import Answer
from fedpeft_client.marks import Marks
from fedpeft_client.members import Members
from fedpeft_client.peers import Peers

NOTHING = Layout(())
"""What an evaluation sends beside counters."""


@dataclass
class Secure:
    """Everything about masked sums that the site ``name`` keeps under ``state``.

    Its machines' secrets are on disk (mode 0600) before what they say leaves, and are gone once the round is over. ``least`` is the
    smallest number of sites among whom it lets itself be hidden.
    """

    name: str
    state: Path
    pinned: Mapping[str, str] = field(default_factory=dict)
    least: int = 1

    @cached_property
    def keys(self) -> Keys:
        """The site's identity."""
        return Keys(self.state / "identity", PURPOSE)

    @cached_property
    def peers(self) -> Peers:
        """Whom it believes."""
        return Peers(self.state / "peers.json", self.pinned)

    @cached_property
    def marks(self) -> Marks:
        """What it signed."""
        return Marks(self.state / "secure" / "signed.log")

    @cached_property
    def members(self) -> Members:
        """Its machines."""
        return Members(self.state / "secure")

    def instance(self, asked: RoundPlan, plan: TaskPlan, kind: str) -> Instance | None:
        """The masked sum that the answer to ``plan`` goes into; None when it would travel in the clear.

        Raises:
            PrivacyError: it is of another round, or the other sites were told to do other work.
        """
        if not plan.HasField("masking"):
            return None
        wanted = masking.purpose(asked.run, asked.round, kind, plan)
        if plan.masking.name.partition("#")[0] != wanted:
            raise PrivacyError(
                f"secure aggregation of task {plan.task!r}: the masked sum is for another plan than the one that came; "
                "a coordinator that tells sites different things could tell them apart"
            )
        if plan.masking.step == Masking.STEP_KEYS:
            return masking.instance_of(plan.masking.instance)
        return self.members.get(asked, plan).instance

    def answer(self, asked: RoundPlan, plan: TaskPlan) -> TaskResult:
        """Answer one step that comes on its own.

        Raises:
            PrivacyError: the step breaks a rule of the protocol; what was known before stays.
            PolicyError: fewer sites than the policy's ``min_cohort``.
        """
        masking.work_of(plan.masking.name, asked.run, asked.round, plan.task)
        step = self._steps.get(plan.masking.step)
        if step is None:
            raise PrivacyError(f"secure aggregation of task {plan.task!r}: step {plan.masking.step} is none that comes on its own")
        return TaskResult(task=plan.task, status=TaskResult.STATUS_OK, masked=step(asked, plan))

    def keyed(self, asked: RoundPlan, plan: TaskPlan, answer: Answer) -> Answer:
        """The keys for ``answer``'s masked sum, with names and lengths of its counters; its values stay here for now."""
        said = self._keys(asked, plan)
        said.counters.update({name: len(values.values) for name, values in answer.result.counters.items()})
        return Answer(_bare(answer.result, plan, said))

    def masked(self, asked: RoundPlan, plan: TaskPlan, answer: Answer, vector: Vector) -> Answer:
        """``answer`` under its masks: values, weight and counters are in one ``vector``.

        Raises:
            PrivacyError: it has counters that the plan does not know, or see `Member.mask`.
        """
        member, schema = self.members.get(asked, plan), vector.schema
        codes = vector.pack(_update(answer, schema))
        sealed = member.mask(codes, masking.boxes_of(plan.masking.boxes), list(plan.masking.dealers), schema.digest)
        self.members.put(asked, member)
        return Answer(_bare(answer.result, plan), flat.pack(schema.layout.fingerprint, vector.write(sealed)))

    @property
    def _steps(self) -> dict[int, Callable[[RoundPlan, TaskPlan], Masked]]:
        return {
            Masking.STEP_KEYS: self._keys,
            Masking.STEP_SHARES: self._shares,
            Masking.STEP_AGREE: self._agree,
            Masking.STEP_REVEAL: self._reveal,
        }

    def _keys(self, asked: RoundPlan, plan: TaskPlan) -> Masked:
        instance = masking.instance_of(plan.masking.instance)
        hidden = instance.fewest
        if hidden < self.least:
            raise PolicyError(
                f"min_cohort: the masked sum of task {plan.task!r} may be opened over {hidden} sites, allowed at least {self.least}; "
                "raise cohort.min_sites of the federation (combine.size where it sums groups), or lower policy.min_cohort"
            )
        member = self.members.find(asked, plan) or Member(instance, self.name, commits=self.keys.secret("vectors"))
        if member.instance != instance or instance.name != plan.masking.name:
            raise PrivacyError(f"secure aggregation of task {plan.task!r}: another instance came under this name before")
        bundle = member.bundle(self.keys)
        self.members.put(asked, member)
        return Masked(bundle=masking.bundle_message(bundle))

    def _shares(self, asked: RoundPlan, plan: TaskPlan) -> Masked:
        member, bundles = self.members.get(asked, plan), masking.bundles_of(plan.masking.bundles)
        boxes = member.deal(bundles, self.peers.believed(self._members(bundles, member.instance), member.instance))
        self.members.put(asked, member)
        return Masked(boxes=map(masking.box_message, boxes))

    @staticmethod
    def _members(bundles: list[Bundle], instance: Instance) -> list[Bundle]:
        strangers = sorted(bundle.site for bundle in bundles if bundle.site not in instance.graph)
        if strangers:
            raise PrivacyError(f"secure aggregation {instance.name}: keys of {strangers[:3]} came, who are no members")
        return bundles

    def _agree(self, asked: RoundPlan, plan: TaskPlan) -> Masked:
        member, survivors = self.members.get(asked, plan), tuple(sorted(plan.masking.survivors))
        marks = _marks(masking.work_of(member.instance.name, asked.run, asked.round, plan.task), member, survivors)
        if self.marks.clash(marks):
            raise PrivacyError(
                f"secure aggregation {member.instance.name}: this site's values of the round are in another sum already, or were in one "
                "over other sites; the difference of the two would show them, so nothing is signed"
            )
        signature = member.agree(survivors, self.keys)
        self.marks.add(marks)
        self.members.put(asked, member)
        return Masked(signature=signature)

    def _reveal(self, asked: RoundPlan, plan: TaskPlan) -> Masked:
        signatures = {name: masking.signature_of(mark) for name, mark in plan.masking.signatures.items()}
        return Masked(reveal=masking.reveal_message(self.members.get(asked, plan).reveal(signatures, self.peers.known())))


def _marks(work: str, member: Member, survivors: tuple[str, ...]) -> dict[str, str]:
    """What signing ``survivors`` says for ever.

    A round's training goes into one instance. Its very values, and an evaluation, which several exchanges may ask for, go into
    sums over the same sites only.
    """
    sites = _digest("\0".join(survivors))
    if work.endswith("/train"):
        return {_digest(f"work {work}"): member.instance.digest.hex(), _digest(f"vector {member.vector}"): sites}
    return {_digest(f"work {work}"): sites}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _update(answer: Answer, schema: Schema) -> Update:
    """The update that ``answer`` carries; counters that it lacks are zeros, and one without values weighs 1.

    Where holdings are hidden, a weight of 0 says that the site holds nothing.
    """
    given = {name: tuple(values.values) for name, values in answer.result.counters.items()}
    given |= {name: (float(answer.result.weight > 0),) for name in HOLDERS if name in schema.counters}
    unknown = sorted(set(given) - set(schema.counters))
    if unknown:
        raise PrivacyError(f"secure aggregation: counters {unknown} are not in the plan's vector; do both sides run one version?")
    counters: Counters = {name: given.get(name, (0.0,) * length) for name, length in schema.counters.items()}
    codes = flat.unpack(answer.array)[1].astype(np.int32) if answer.array else np.zeros(0, np.int32)
    return Update(schema.layout, schema.grid, codes, answer.result.weight if answer.array else 1.0, counters, 1)


def _bare(result: TaskResult, plan: TaskPlan, said: Masked | None = None) -> TaskResult:
    """``result`` without its weight and its counters, and where holdings are hidden without what only a holder has."""
    bare = TaskResult()
    bare.CopyFrom(result)
    for name in ("weight", "counters", *(("train_seconds", "epsilon") if plan.task_blind else ())):
        bare.ClearField(name)
    if said is not None:
        bare.masked.CopyFrom(said)
    return bare
