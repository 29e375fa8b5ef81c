"""The in-memory twin: handlers in this process behind the real wire encoding, with a hook for faults."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from fedpeft.wire import Envelope, flower
from fedpeft.wire.v1.federation_pb2 import Capabilities, Hello
from fedpeft_coordinator.transport import Answer, Failure

Handler = Callable[[Envelope], Envelope]
Fault = Callable[[str, Envelope], Failure | None]


def no_fault(_site: str, _request: Envelope) -> Failure | None:
    """The hook that lets everything through."""
    return None


@dataclass
class MemoryTransport:
    """Calls ``handlers`` in the order that ``order`` gives; ``fault`` may answer in a site's place."""

    handlers: dict[str, Handler]
    hello: Hello = field(default_factory=Hello)
    fault: Fault = no_fault
    order: Callable[[list[str]], list[str]] = sorted

    def sites(self) -> dict[str, Capabilities]:
        """Say hello to every handler."""
        hello = Envelope.of("hello", self.hello)
        alive = [site for site in self.handlers if self.fault(site, hello) is None]
        return {site: through(self.handlers[site](through(hello))).open(Capabilities) for site in alive}

    def exchange(self, requests: Mapping[str, Envelope], deadline: float, retries: int) -> Iterator[Answer]:
        """Ask one site after the other."""
        began = time.monotonic()
        for site in self.order(list(requests)):
            yield Answer(site, self._ask(site, requests[site], retries), time.monotonic() - began)

    def _ask(self, site: str, request: Envelope, retries: int) -> Envelope | Failure:
        failure: Failure | None = None
        for _ in range(retries + 1):
            failure = self.fault(site, request) if site in self.handlers else Failure("is not connected", vanished=True)
            if failure is None:
                return self._call(site, request)
        return failure or Failure("was not asked")

    def _call(self, site: str, request: Envelope) -> Envelope | Failure:
        try:
            return through(self.handlers[site](through(request)))
        except Exception as fault:  # noqa: BLE001 - as at a site's process edge: only the type of a fault leaves it
            return Failure(type(fault).__name__)


def through(envelope: Envelope) -> Envelope:
    """The envelope after a trip through Flower's records."""
    return flower.from_records(flower.to_records(envelope))
