"""Where a task's round begins at the site: the global adapter, whole, patched or stepped, and what the scheme may know of the site."""

from __future__ import annotations

from typing import Any

from fedpeft.errors import AdapterError, UpdateError
from fedpeft.schemes import Controls, SiteContext
from fedpeft.tensors import Layout, Tensors
from fedpeft.wire import Envelope
from fedpeft.wire.codecs import as_delta, hear
from fedpeft.wire.envelope import control_key
from fedpeft.wire.v1.federation_pb2 import TaskPlan
from fedpeft_client.config import SiteConfig
from fedpeft_client.personal import Own
from fedpeft_client.plan import Work, codec_from, rank_of
from fedpeft_client.store import Store


class MissingVersion(AdapterError):  # noqa: N818 - it says what happened, as its base does
    """The site lacks the adapter that the plan's array patches: the coordinator must send it whole."""


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


def _float32(values: Any) -> Any:
    if values.dtype.str not in ("<f4", "=f4"):
        raise UpdateError(f"wire: start values are {values.dtype}, float32 was expected")
    return values.astype("float32", copy=False)


def _step(plan: TaskPlan, held: Tensors, array: Any) -> Tensors:
    """What ``held`` becomes: the values of ``array``, or the step that it writes in the plan's codec."""
    if not plan.down_codec_json:
        return Tensors(held.layout, _float32(array))
    codec = as_delta(codec_from(plan.task, plan.down_codec_json))
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
