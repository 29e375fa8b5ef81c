"""How rounds reach sites: a Protocol with a twin over Flower's grid and one in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedpeft.wire import Envelope
from fedpeft.wire.v1.federation_pb2 import Capabilities


@dataclass(frozen=True)
class Failure:
    """Why a site did not answer: one line. ``vanished``: it cannot be counted on until it says hello again."""

    reason: str
    vanished: bool = False


@dataclass(frozen=True)
class Answer:
    """What came of asking one site; ``seconds`` since it was first asked."""

    site: str
    result: Envelope | Failure
    seconds: float = 0.0


class Transport(Protocol):
    """Names sites by their own names; what carries the messages, and its addresses, stay inside."""

    def sites(self) -> dict[str, Capabilities]:
        """The sites that are connected and idle, by name, each with its answer to a hello. Returns soon."""
        ...

    def exchange(self, requests: Mapping[str, Envelope], deadline: float, retries: int) -> Iterator[Answer]:
        """Send each site its message and yield exactly one answer per site, as they come.

        A site that is not connected yet is asked when it appears. One whose node or worker dies is asked again, ``retries``
        times at most. After ``deadline`` seconds the rest is answered with a `Failure`.

        Raises:
            LinkError: the transport itself is gone and cannot be brought back.
        """
        ...
