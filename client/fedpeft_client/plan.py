"""A task plan as it arrived, turned into the platform's nouns and checked against itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from fedpeft import config
from fedpeft.errors import AdapterError, UpdateError
from fedpeft.schemes import SCHEMES, Controls, Masks, Phase, Scheme, SiteContext
from fedpeft.tensors import Layout, Tensors
from fedpeft.training.settings import TrainSettings
from fedpeft.update import Grid
from fedpeft.wire import Envelope, flat
from fedpeft.wire.codecs import CODECS, Codec, DeltaCodec, Lanes, Plain, Ring, as_delta, hear
from fedpeft.wire.envelope import control_key
from fedpeft.wire.masking import OWN_FIELDS
from fedpeft.wire.v1.federation_pb2 import RoundPlan, TaskPlan
from fedpeft_client.config import SiteConfig
from fedpeft_client.personal import Own
from fedpeft_client.policy import Ask
from fedpeft_client.secure import fewest
from fedpeft_client.store import Store

if TYPE_CHECKING:
    from fedpeft.adapters import AdapterSpec
    from fedpeft.privacy.secagg import Instance
    from fedpeft.tasks import Task


class MissingVersion(AdapterError):  # noqa: N818 - it says what happened, as its base does
    """The site lacks the adapter that the plan's array patches: the coordinator must send it whole."""


@dataclass(frozen=True)
class Work:
    """One task of a round, read: everything but rows, base and start values. ``round`` is the task's own.

    ``codec`` and ``lanes`` None send the grid's 32-bit codes; only one of them is ever there.
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

    @property
    def upload_bytes(self) -> int:
        """The most bytes of values that travel up, without weight and counters."""
        if self.lanes is not None:
            return self.lanes.bytes()
        return (self.codec or Plain()).most(self.up.size, 1)

    @property
    def grid(self) -> Grid:
        """The round's grid. Raises `UpdateError` when the plan's numbers make none."""
        return Grid(self.plan.grid_sites, self.plan.grid_reach)

    @property
    def up(self) -> Layout:
        """The layout of what travels up."""
        return self.scheme.travels(self.spec.layout, self.phase)

    @property
    def trained(self) -> Layout:
        """The layout of what trains."""
        return self.spec.layout.subset(self.phase.trains)


def read(round_plan: RoundPlan, plan: TaskPlan) -> Work:
    """Build the nouns that ``plan`` describes.

    Raises:
        UpdateError: a field cannot be read, the scheme can do nothing with the adapter, its phase of this round is another one,
            or what it sends would hold private tensors.
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
    work = _checked(Work(number, plan, task, spec, scheme, scheme.phase(number, spec.layout), settings))
    codec = _codec(plan)
    if isinstance(codec, Ring):
        return dataclasses.replace(work, lanes=Lanes.told(work.up, work.phase.roles, codec, plan.scales, work.grid))
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


def _built(task: str, text: str) -> Codec:
    """The codec that ``text`` describes. Raises `UpdateError`."""
    try:
        return config.build(CODECS, _json(text), "codec")
    except ValueError as fault:
        raise UpdateError(f"plan of task {task!r}: {fault}; do both sides run one version?") from None


def _codec(plan: TaskPlan) -> Codec:
    """The codec of what travels up. Raises `UpdateError` when it cannot be read, or does not go with the rest of the plan."""
    codec = _built(plan.task, plan.codec_json) if plan.codec_json else Plain()
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
    leaks = sorted(work.up.roles & phase.private)
    if leaks:
        raise UpdateError(f"scheme {scheme.kind}: sends the private roles {leaks} in the task's round {work.round}; it is broken")
    return work


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
        task=plan.task,
        base=tuple(dict.fromkeys((work.spec.base_model, work.spec.base, identity))),
        method=type(work.spec.method).kind,
        rank=rank_of(work.scheme, work.spec.method, site.policy.max_rank),
        upload_bytes=work.upload_bytes + flat.HEADER,
        cohort=plan.cohort if instance is None else fewest(instance),
        steps=max(work.settings.steps, plan.gates.steps) * work.settings.accumulate,
        secure_aggregation=instance is not None,
        epsilon=plan.epsilon or None,
    )


def start(work: Work, envelope: Envelope, adapters: Store) -> Tensors:
    """The global adapter that the plan starts from: kept from before, sent whole, or patched; its digest is verified.

    Raises:
        MissingVersion: the plan patches an adapter that the site does not hold, or holds damaged.
        AdapterError: values do not have the promised digest, or are not finite.
        UpdateError: the array is missing, damaged or of another layout.
    """
    layout, wanted = work.spec.layout, work.plan.adapter_digest
    kept = _kept(wanted, layout, adapters)
    if kept is not None:
        return kept
    given = layout.subset(work.plan.down_roles) if work.plan.down_roles else layout
    array = envelope.array(work.plan.task, given.fingerprint)
    if not work.plan.previous_digest:
        whole = Tensors(given, _float32(array))
    else:
        held = _previous(work, adapters)
        whole = held.patch(_step(work.plan, held.pick(given.roles), array))
    if whole.layout != layout or whole.digest != wanted:
        raise AdapterError(
            f"plan of task {work.plan.task!r}: start values have digest {whole.digest[:12]}, the plan promises {wanted[:12]}"
        )
    if not whole.finite:
        raise AdapterError(f"plan of task {work.plan.task!r}: start values are not finite; roll the task back to an earlier version")
    adapters.put(wanted, whole.flat.astype("<f4", copy=False).tobytes())
    return whole


def context(work: Work, envelope: Envelope, site: SiteConfig, own: Own) -> SiteContext:
    """What the scheme may know of this site when it trains.

    Raises:
        UpdateError: the global control is missing, damaged or of another layout.
        AdapterError: it does not have the promised digest.
    """
    rank = rank_of(work.scheme, work.spec.method, site.policy.max_rank)
    smaller = rank < int(getattr(work.spec.method, "r", 0))
    return SiteContext(work.plan.seed, site.name, rank if smaller else None, _controls(work, envelope, own))


def _controls(work: Work, envelope: Envelope, own: Own) -> tuple[Tensors, Tensors] | None:
    if not isinstance(work.scheme, Controls):
        return None
    layout, task = work.spec.layout.subset(work.phase.roles), work.plan.task
    common = Tensors(layout, _float32(envelope.array(control_key(task), layout.fingerprint)))
    if common.digest != work.plan.control_digest or not common.finite:
        raise AdapterError(f"plan of task {task!r}: the control is not the promised {work.plan.control_digest[:12]}, or is not finite")
    return common, own.control(layout)


def answer_key(site: SiteConfig, kind: str, round_plan: RoundPlan, work: Work, data_digest: str) -> str:
    """SHA-256 over all that determines the answer; a plan sent again after a crash on either side has the same key."""
    plan = TaskPlan()
    plan.CopyFrom(work.plan)
    for name in OWN_FIELDS:  # `Own.digest` stands for counted_round
        plan.ClearField(name)
    head = json.dumps([kind, site.name, round_plan.federation, round_plan.round, data_digest]).encode()
    return hashlib.sha256(head + b"\0" + plan.SerializeToString(deterministic=True)).hexdigest()


def settings_json(settings: TrainSettings) -> str:
    """``settings`` as a plan carries them."""
    return json.dumps(dataclasses.asdict(settings), sort_keys=True)


def _float32(values: Any) -> Any:
    if values.dtype.str not in ("<f4", "=f4"):
        raise UpdateError(f"wire: start values are {values.dtype}, float32 was expected")
    return values.astype("float32", copy=False)


def _step(plan: TaskPlan, held: Tensors, array: Any) -> Tensors:
    """What ``held`` becomes: the values of ``array``, or the step that it writes in the plan's codec."""
    if not plan.down_codec_json:
        return Tensors(held.layout, _float32(array))
    codec = as_delta(_built(plan.task, plan.down_codec_json))
    if codec is None or array.dtype.str != "|u1":
        raise UpdateError(f"plan of task {plan.task!r}: a step of {array.dtype} in {plan.down_codec_json}; do both sides run one version?")
    return hear(codec, held, array.data)


def _previous(work: Work, adapters: Store) -> Tensors:
    previous = _kept(work.plan.previous_digest, work.spec.layout, adapters)
    if previous is None:
        raise MissingVersion(f"task {work.plan.task!r}: this site does not hold adapter {work.plan.previous_digest[:12]}; send it whole")
    return previous


def _kept(digest: str, layout: Layout, adapters: Store) -> Tensors | None:
    import numpy as np

    blob = adapters.get(digest) if digest else None
    if blob is None or len(blob) != 4 * layout.size:
        return None
    tensors = Tensors(layout, np.frombuffer(blob, "<f4").astype(np.float32))
    return tensors if tensors.digest == digest else None
