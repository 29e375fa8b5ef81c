"""Envelopes as Flower records, through Flower's public API only.

A message holds two records: ``fedpeft`` (kind and protobuf body) and ``arrays`` (one byte array per task). Arrays carry our
own ``stype``, so Flower never parses them; its content addressing sends equal arrays of a round once to the SuperLink.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedpeft.errors import LinkError
from fedpeft.wire.envelope import KINDS, Envelope

STYPE = "fedpeft.flat.v1"


def to_records(envelope: Envelope) -> RecordDict:
    """A fresh RecordDict that carries ``envelope`` (Flower shares records by reference: never reuse one)."""
    arrays = {task: Array("uint8", (len(data),), STYPE, bytes(data)) for task, data in envelope.arrays.items()}
    head = ConfigRecord({"kind": envelope.kind, "body": envelope.body})
    return RecordDict({"fedpeft": head, "arrays": ArrayRecord(arrays), "metrics": MetricRecord({"bytes": envelope.size})})


def from_records(records: RecordDict) -> Envelope:
    """Inverse of `to_records`. Raises `LinkError` when the records are of another app or version."""
    head = records.config_records.get("fedpeft")
    kind, body = (head.get("kind"), head.get("body")) if head else (None, None)
    if kind not in KINDS or not isinstance(body, bytes):
        raise LinkError(f"flower: message of kind {kind!r} is not one of {list(KINDS)}; do both sides run one fedpeft version?")
    arrays: Mapping[str, Array] = records.array_records.get("arrays") or {}
    foreign = sorted(task for task, array in arrays.items() if array.stype != STYPE)
    if foreign:
        raise LinkError(f"flower: arrays {foreign} are not of type {STYPE}; do both sides run one fedpeft version?")
    return Envelope(str(kind), body, {task: array.data for task, array in arrays.items()})


def message_type(kind: str) -> str:
    """Flower's message type for an envelope kind: ``train.fedpeft``, ``evaluate.fedpeft`` or ``query.fedpeft``."""
    return {"train": "train.fedpeft", "evaluate": "evaluate.fedpeft"}.get(kind, "query.fedpeft")


def request(envelope: Envelope, node: int, group: str, ttl: float) -> Message:
    """A Flower message to ``node``; ``ttl`` in seconds."""
    return Message(to_records(envelope), node, message_type(envelope.kind), group_id=group, ttl=ttl)
