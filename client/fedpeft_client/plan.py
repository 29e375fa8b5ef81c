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
from fedpeft.schemes import SCHEMES, Phase, Scheme
from fedpeft.tensors import Layout, Tensors
from fedpeft.training.settings import TrainSettings
from fedpeft.update import Grid
from fedpeft.wire import Envelope
from fedpeft.wire.v1.federation_pb2 import RoundPlan, TaskPlan
from fedpeft_client.config import SiteConfig
from fedpeft_client.policy import Ask
from fedpeft_client.store import Store

if TYPE_CHECKING:
    from fedpeft.adapters import AdapterSpec
    from fedpeft.tasks import Task

VOLATILE = ("previous_digest", "down_roles", "cohort")
"""Fields of a plan that may differ when it is sent again although the same work is meant."""
FLAT_HEADER_BYTES = 80


class MissingVersion(AdapterError):  # noqa: N818 - it says what happened, as its base does
    """The site lacks the adapter that the plan's array patches: the coordinator must send it whole."""


@dataclass(frozen=True)
class Work:
    """One task of a round, read: everything but rows, base and start values."""

    round: int
    plan: TaskPlan
    task: Task
    spec: AdapterSpec
    scheme: Scheme
    phase: Phase
    settings: TrainSettings

    @property
    def grid(self) -> Grid:
        """The round's grid. Raises `UpdateError` when the plan's numbers make none."""
        return Grid(self.plan.grid_sites, self.plan.grid_reach)

    @property
    def up(self) -> Layout:
        """The layout of what travels up."""
        return self.spec.layout.subset(self.phase.roles)


def read(round_plan: RoundPlan, plan: TaskPlan) -> Work:
    """Build the nouns that ``plan`` describes.

    Raises:
        UpdateError: a field cannot be read, or the phase is not the one that the scheme has in this round.
    """
    from fedpeft.adapters import AdapterSpec
    from fedpeft.tasks import TASKS

    try:
        task = config.build(TASKS, json.loads(plan.task_json), f"task {plan.task}")
        spec = AdapterSpec.from_json(json.loads(plan.spec_json))
        scheme: Scheme = config.build(SCHEMES, json.loads(plan.scheme_json), "scheme")
        settings = TypeAdapter(TrainSettings).validate_python(json.loads(plan.settings_json))
    except ValidationError as faults:
        first = faults.errors()[0]
        raise UpdateError(f"plan of task {plan.task!r}: settings: {first['loc']}: {first['msg']}; do both sides run one version?") from None
    except (ValueError, KeyError, TypeError) as fault:
        raise UpdateError(f"plan of task {plan.task!r} cannot be read: {fault}; do both sides run one version?") from None
    phase = scheme.phase(round_plan.round, spec.layout)
    if frozenset(plan.roles) != phase.roles & spec.layout.roles:
        raise UpdateError(
            f"plan of task {plan.task!r}: roles {sorted(plan.roles)} in round {round_plan.round}, "
            f"scheme {scheme.kind} trains {sorted(phase.roles & spec.layout.roles)} there; do both sides run one version?"
        )
    return Work(round_plan.round, plan, task, spec, scheme, phase, settings)


def ask(work: Work, identity: str) -> Ask:
    """What the site's policy must judge; ``identity`` is the site's base, which may also be named in the policy."""
    plan = work.plan
    return Ask(
        task=plan.task,
        base=tuple(dict.fromkeys((work.spec.base_model, work.spec.base, identity))),
        method=type(work.spec.method).kind,
        rank=int(getattr(work.spec.method, "r", 0)),
        upload_bytes=4 * work.up.size + FLAT_HEADER_BYTES,
        cohort=plan.cohort,
        steps=work.settings.steps * work.settings.accumulate,
        secure_aggregation=plan.secure_aggregation,
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
    part = Tensors(given, _float32(envelope.array(work.plan.task, given.fingerprint)))
    whole = part if not work.plan.previous_digest else _previous(work, adapters).patch(part)
    if whole.layout != layout or whole.digest != wanted:
        raise AdapterError(
            f"plan of task {work.plan.task!r}: start values have digest {whole.digest[:12]}, the plan promises {wanted[:12]}"
        )
    if not whole.finite:
        raise AdapterError(f"plan of task {work.plan.task!r}: start values are not finite; roll the task back to an earlier version")
    adapters.put(wanted, whole.flat.astype("<f4", copy=False).tobytes())
    return whole


def answer_key(site: SiteConfig, kind: str, round_plan: RoundPlan, work: Work, data_digest: str) -> str:
    """SHA-256 over all that determines the answer; a plan sent again after a crash on either side has the same key."""
    plan = TaskPlan()
    plan.CopyFrom(work.plan)
    for name in VOLATILE:
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
