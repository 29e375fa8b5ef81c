"""Envelope: one message between coordinator and site, independent of the transport that carries it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.wire import flat

KINDS = ("hello", "choose", "train", "evaluate", "secure", "reply")
Proto = TypeVar("Proto", bound=Message)


@dataclass(frozen=True)
class Envelope:
    """A protobuf ``body`` and the flat arrays that travel beside it, packed (see `fedpeft.wire.flat`) and keyed by task.

    A task's control (SCAFFOLD) is a second array under `control_key`.
    """

    kind: str
    body: bytes
    arrays: Mapping[str, bytes] = field(default_factory=dict)

    @staticmethod
    def of(kind: str, message: Message, arrays: Mapping[str, bytes] | None = None) -> Envelope:
        """Serialise ``message``."""
        return Envelope(kind, message.SerializeToString(deterministic=True), dict(arrays or {}))

    def open(self, kind: type[Proto]) -> Proto:
        """Parse the body as ``kind``. Raises `UpdateError` when it is not one."""
        message = kind()
        try:
            message.ParseFromString(self.body)
        except DecodeError as fault:
            raise UpdateError(f"wire: the body of a {self.kind!r} message is malformed: {fault}") from None
        return message

    def array(self, task: str, fingerprint: str) -> NDArray[Any]:
        """The flat array of ``task``, a read-only view. Raises `UpdateError` when missing, damaged or of another layout."""
        if task not in self.arrays:
            raise UpdateError(f"wire: no array for task {task!r}; the message carries {sorted(self.arrays)}")
        seen, values = flat.unpack(self.arrays[task])
        if seen != fingerprint:
            raise UpdateError(f"wire: the array of task {task!r} has layout {seen[:12]}, {fingerprint[:12]} was expected")
        return values

    @property
    def size(self) -> int:
        """Bytes on the wire, without the transport's own framing."""
        return len(self.body) + sum(map(len, self.arrays.values()))


def control_key(task: str) -> str:
    """The key of the array that carries the global control of ``task``; no task's name holds the sign."""
    return f"{task}#control"
