"""A finished answer of one task: the protobuf result and the array beside it, as one blob on the site's disk."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np

from fedpeft.update import Counters, Update
from fedpeft.wire import flat
from fedpeft.wire.codecs import Lanes
from fedpeft.wire.v1.federation_pb2 import TaskResult

LENGTH = struct.Struct("<Q")
Status = TaskResult.Status


@dataclass(frozen=True)
class Answer:
    """What one task sends back; ``array`` is packed (see `fedpeft.wire.flat`) and empty when nothing but counters travels."""

    result: TaskResult
    array: bytes = b""

    @property
    def digest(self) -> str:
        """SHA-256 of all that travels."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all that travels."""
        return self.result.ByteSize() + len(self.array)

    def to_bytes(self) -> bytes:
        """A form that `from_bytes` reads back, bit for bit."""
        head = self.result.SerializeToString(deterministic=True)
        return LENGTH.pack(len(head)) + head + self.array

    @staticmethod
    def from_bytes(blob: bytes) -> Answer:
        """Inverse of `to_bytes`."""
        (length,) = LENGTH.unpack_from(blob)
        head = blob[LENGTH.size : LENGTH.size + length]
        return Answer(TaskResult.FromString(head), blob[LENGTH.size + length :])


def of_update(task: str, update: Update, seconds: float, adapter_digest: str, message: bytes | None = None) -> Answer:
    """The answer to a training plan; a codec's ``message`` travels in place of the update's codes."""
    result = TaskResult(
        task=task,
        status=TaskResult.STATUS_OK,
        weight=update.weight,
        layout_fingerprint=update.layout.fingerprint,
        train_seconds=seconds,
        adapter_digest=adapter_digest,
    )
    _put(result, update.counters)
    values = update.codes if message is None else np.frombuffer(message, np.uint8)
    return Answer(result, flat.pack(update.layout.fingerprint, values))


def narrowed(answer: Answer, lanes: Lanes) -> Answer:
    """``answer`` with its codes, which are rounded to public scales, in as few bits as ``lanes`` have."""
    fingerprint, codes = flat.unpack(answer.array, verify=False)
    return Answer(answer.result, flat.pack(fingerprint, lanes.write(lanes.shrink(codes.astype(np.int32)))))


def of_counters(task: str, counters: Counters, seconds: float, adapter_digest: str) -> Answer:
    """The answer to an evaluation plan."""
    result = TaskResult(task=task, status=TaskResult.STATUS_OK, train_seconds=seconds, adapter_digest=adapter_digest)
    _put(result, counters)
    return Answer(result)


def without(task: str, status: Status, reason: str) -> Answer:
    """The answer of a task that was not done; ``reason`` is one line and never quotes a row."""
    return Answer(TaskResult(task=task, status=status, reason=" ".join(reason.split())))


def _put(result: TaskResult, counters: Counters) -> None:
    for name, values in counters.items():
        result.counters[name].values.extend(values)
