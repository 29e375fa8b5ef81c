"""A task plan as it arrived, turned into the platform's nouns and checked against itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from fedpeft import config
from fedpeft.bases.base import OWN
from fedpeft.bases.encoders import models_of
from fedpeft.errors import PrivacyError, UpdateError
from fedpeft.privacy import promise
from fedpeft.privacy.mechanism import Mechanism
from fedpeft.privacy.promise import Promise, Whole
from fedpeft.schemes import SCHEMES, Masks, Phase, Scheme
from fedpeft.schemes.base import linear
from fedpeft.tensors import Layout
from fedpeft.training.settings import TrainSettings
from fedpeft.update import Grid
from fedpeft.wire import flat
from fedpeft.wire.codecs import CODECS, Codec, DeltaCodec, Lanes, Plain, Ring, as_delta
from fedpeft.wire.masking import OWN_FIELDS
from fedpeft.wire.v1.federation_pb2 import RoundPlan, TaskPlan
from fedpeft_client.config import SiteConfig
from fedpeft_client.policy import Ask, today
from fedpeft_client.secure import NOTHING

if TYPE_CHECKING:
    from fedpeft.adapters import AdapterSpec
    from fedpeft.privacy.secagg import Instance
    from fedpeft.tasks import Task


@dataclass(frozen=True)
class Work:
    """One task of a round, read: everything but rows, base and start values. ``round`` is the task's own.

    ``codec`` and ``lanes`` None send the grid's 32-bit codes; only one of them is ever there. ``promise`` is how the answer is protected
    (None: it is not), ``scores`` says that it holds counters of held-out rows instead of a delta.
    """

    round: int
    plan: TaskPlan
    task: Task
    spec: AdapterSpec
    scheme: Scheme
    phase: Phase
    settings: TrainSettings
    codec: DeltaCodec | None = None
    lanes: Lanes | None = None
    promise: Promise | None = None
    scores: bool = False

    @property
    def upload_bytes(self) -> int:
        """The most bytes of values that travel up, without weight and counters."""
        if self.lanes is not None:
            return self.lanes.bytes()
        return (self.codec or Plain()).most(self.sent.size, 1)

    @property
    def mechanism(self) -> Mechanism | None:
        """What bounds and noises the site's vector; None where it leaves as it is."""
        return self.promise.mechanism if isinstance(self.promise, Whole) else None

    @property
    def grid(self) -> Grid:
        """The round's grid. Raises `UpdateError` when the plan's numbers make none."""
        return Grid(self.plan.grid_sites, self.plan.grid_reach) if self.mechanism is None else self.mechanism.grid

    @property
    def answer(self) -> Layout:
        """The layout of the answer's values: of the delta, or of none."""
        return NOTHING if self.scores else self.up

    @property
    def sent(self) -> Layout:
        """The layout of the vector that leaves: under a mechanism counters are in it as well."""
        return self.answer if self.mechanism is None else self.mechanism.layout(self.answer)

    @property
    def up(self) -> Layout:
        """The layout of what travels up."""
        return self.scheme.travels(self.spec.layout, self.phase)

    @property
    def trained(self) -> Layout:
        """The layout of what trains."""
        return self.spec.layout.subset(self.phase.trains)


def read(round_plan: RoundPlan, plan: TaskPlan, scores: bool = False) -> Work:
    """Build the nouns that ``plan`` describes.

    Raises:
        UpdateError: a field cannot be read, the scheme can do nothing with the adapter, its phase of this round is another one,
            or what it sends would hold private tensors.
        PrivacyError: what it says of privacy cannot be read, or cannot hold.
    """
    from fedpeft.adapters import AdapterSpec
    from fedpeft.tasks import TASKS

    try:
        task = config.build(TASKS, _json(plan.task_json), f"task {plan.task}")
        spec = AdapterSpec.from_json(_json(plan.spec_json))
        scheme: Scheme = config.build(SCHEMES, _json(plan.scheme_json), "scheme")
        settings = _settings(_json(plan.settings_json))
    except ValidationError as faults:
        first = faults.errors()[0]
        raise UpdateError(f"plan of task {plan.task!r}: settings: {first['loc']}: {first['msg']}; do both sides run one version?") from None
    except (ValueError, KeyError, TypeError) as fault:
        raise UpdateError(f"plan of task {plan.task!r} cannot be read: {fault}; do both sides run one version?") from None
    number = plan.task_round or round_plan.round
    promised = promise.loads(plan.privacy_json) if plan.privacy_json else None
    work = Work(number, plan, task, spec, scheme, scheme.phase(number, spec.layout), settings, promise=promised, scores=scores)
    return _written(_checked(work), _codec(plan))


def _written(work: Work, codec: Codec) -> Work:
    """``work`` with how its values travel; a mechanism's grid says it by itself. Raises `UpdateError`."""
    if work.mechanism is not None:
        return dataclasses.replace(work, lanes=Lanes.of_grid(work.sent, work.grid))
    if isinstance(codec, Ring):
        return dataclasses.replace(work, lanes=Lanes.told(work.up, work.phase.roles, codec, work.plan.scales, work.grid))
    return dataclasses.replace(work, codec=as_delta(codec))


def _json(text: str) -> Any:
    """``text`` parsed. Raises `ValueError`; a nest deep enough to end the stack is one of its kinds."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def _settings(table: Any) -> TrainSettings:
    """Training settings; one that this site does not know is refused, as leaving it out would be other training. Raises `ValueError`."""
    known = [item.name for item in dataclasses.fields(TrainSettings)]
    unknown = sorted(set(table) - set(known)) if isinstance(table, dict) else [type(table).__name__]
    if unknown:
        raise ValueError(f"settings: unknown keys {unknown}; known keys are {known}")
    return TypeAdapter(TrainSettings).validate_python(table)


def codec_from(task: str, text: str) -> Codec:
    """The codec that ``text`` describes. Raises `UpdateError`."""
    try:
        return config.build(CODECS, _json(text), "codec")
    except ValueError as fault:
        raise UpdateError(f"plan of task {task!r}: {fault}; do both sides run one version?") from None


def _codec(plan: TaskPlan) -> Codec:
    """The codec of what travels up. Raises `UpdateError` when it cannot be read, or does not go with the rest of the plan."""
    codec = codec_from(plan.task, plan.codec_json) if plan.codec_json else Plain()
    if not codec.masked and (plan.secure_aggregation or plan.HasField("masking")):
        raise UpdateError(
            f"plan of task {plan.task!r}: codec {codec.kind} and secure aggregation: messages of scales of the site's own have no sum; "
            "the coordinator must send codec ring with the round's scales"
        )
    return codec


def _checked(work: Work) -> Work:
    plan, scheme, phase = work.plan, work.scheme, work.phase
    scheme.check(work.spec.layout)
    roles = phase.roles & work.spec.layout.roles
    if frozenset(plan.roles) != roles:
        raise UpdateError(
            f"plan of task {plan.task!r}: roles {sorted(plan.roles)} in the task's round {work.round}, "
            f"scheme {scheme.kind} trains {sorted(roles)} there; do both sides run one version?"
        )
    if (plan.secure_aggregation or plan.HasField("masking")) and not scheme.sum_only:
        raise UpdateError(
            f"plan of task {plan.task!r}: promises secure aggregation, which shows the coordinator nothing but sums, and scheme "
            f"{scheme.kind} needs every site's part; the coordinator cannot keep that promise"
        )
    if plan.task_blind and not plan.HasField("masking"):
        raise UpdateError(f"plan of task {plan.task!r}: hides who holds it, and comes without a masked sum, so that zeros would be seen")
    if plan.task_blind and work.mechanism is not None:
        raise UpdateError(f"plan of task {plan.task!r}: hides who holds it, and noise over sites counts all of them as holders")
    if work.mechanism is not None:
        _check_noise(work)
    leaks = sorted(work.up.roles & phase.private)
    if leaks:
        raise UpdateError(f"scheme {scheme.kind}: sends the private roles {leaks} in the task's round {work.round}; it is broken")
    return work


def _check_noise(work: Work) -> None:
    """Raise `PrivacyError` where noise on one vector does not protect what the plan asks for."""
    task, roles, scheme = work.plan.task, work.phase.roles & work.spec.layout.roles, work.scheme
    if not linear(roles) or work.up.roles - roles or work.codec is not None:
        raise PrivacyError(
            f"plan of task {task!r}: noise on roles {sorted(work.up.roles)} of scheme {scheme.kind}, codec "
            f"{'none' if work.codec is None else work.codec.kind}: client-level noise needs one factor, nothing beside it and no codec"
        )


def rank_of(scheme: Scheme, method: object, limit: int) -> int:
    """The rank that a site of at most ``limit`` would train: the method's, or ``limit`` under a scheme that takes smaller ones."""
    rank = int(getattr(method, "r", 0))
    return min(rank, limit) if isinstance(scheme, Masks) else rank


def ask(work: Work, identity: str, site: SiteConfig, instance: Instance | None = None) -> Ask:
    """What the site's policy must judge; ``identity`` is the site's base, which may also be named in the policy.

    ``instance`` is the masked sum that the answer goes into: what the plan says of itself counts for nothing.
    """
    plan = work.plan
    return Ask(
        task=work.task.name,
        base=tuple(dict.fromkeys((work.spec.base_model, work.spec.base, identity))),
        method=type(work.spec.method).kind,
        rank=rank_of(work.scheme, work.spec.method, site.policy.max_rank),
        upload_bytes=work.upload_bytes + flat.HEADER,
        cohort=plan.cohort if instance is None else instance.fewest,
        steps=max(work.settings.steps, plan.gates.steps) * work.settings.accumulate,
        secure_aggregation=instance is not None,
        accounted=work.promise is not None or bool(site.policy.noise),
        modules=tuple(entry.name for entry in work.answer.entries),
        task_blind=plan.task_blind,
        **today(site),
        encoders=tuple(model for model in (models_of(plan.encoder) if plan.encoder else ()) if model != OWN),
    )


def answer_key(site: SiteConfig, kind: str, round_plan: RoundPlan, work: Work, data_digest: str) -> str:
    """SHA-256 over all that determines the answer; a plan sent again after a crash on either side has the same key."""
    plan = TaskPlan()
    plan.CopyFrom(work.plan)
    for name in OWN_FIELDS:  # `Own.digest` stands for counted_round
        plan.ClearField(name)
    head = json.dumps([kind, site.name, round_plan.federation, round_plan.round, data_digest]).encode()
    return hashlib.sha256(head + b"\0" + plan.SerializeToString(deterministic=True)).hexdigest()
