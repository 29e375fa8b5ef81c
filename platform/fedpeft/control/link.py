"""One connection to a control plane: calls with deadlines, errors of our own, and streams that go on after a break."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedpeft.control.address import Address, Identity
from fedpeft.control.faults import AGAIN, error_of
from fedpeft.errors import FedpeftError, LinkError, PolicyError

if TYPE_CHECKING:
    import grpc

UNARY = 30.0
"""Seconds for a call that answers once."""
STREAM = 3600.0
"""Seconds for a stream of one version; a dead peer is found by keepalive within 40 s."""
TRIES = 8
"""How often a stream is begun again that brought nothing more."""
BROKEN = AGAIN | {"INTERNAL", "UNKNOWN", "CANCELLED", "DEADLINE_EXCEEDED"}
"""How a stream ends that can go on where it stopped."""


class Link(AbstractContextManager["Link"]):
    """A lazily opened channel to ``address`` that shows ``identity``."""

    def __init__(self, address: Address, identity: Identity | None = None) -> None:
        self.address, self.identity = address, identity
        self._channel: grpc.Channel | None = None
        self._stubs: dict[str, Any] = {}

    def __exit__(self, *_fault: object) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel, self._stubs = None, {}

    def stub(self, service: str) -> Any:
        """The stub of ``service``. Raises as `channel.connect` does."""
        from fedpeft.control.channel import connect

        if self._channel is None:
            self._channel = connect(self.address, self.identity)
        if service not in self._stubs:
            module = import_module(f"fedpeft.v1.{service.lower()}_pb2_grpc")
            self._stubs[service] = getattr(module, f"{service}Stub")(self._channel)
        return self._stubs[service]

    def unary(self, service: str, method: str, request: Any, seconds: float = UNARY) -> Any:
        """Call and return the answer. Raises the error that the server meant, or `LinkError`."""
        import grpc

        try:
            return getattr(self.stub(service), method)(request, timeout=seconds)
        except grpc.RpcError as call:
            raise self.fault(call) from None

    def stream(self, service: str, method: str, request: Any, seconds: float = STREAM) -> Iterator[Any]:
        """The answers of a stream, once. Raises as `unary` does."""
        import grpc

        call = getattr(self.stub(service), method)(request, timeout=seconds)
        try:
            yield from call
        except grpc.RpcError as fault:
            raise self.fault(fault) from None
        finally:
            call.cancel()

    @contextmanager
    def broken(self, call: Any) -> Iterator[Any]:
        """Use a running ``call`` and end it; `LinkError` when it broke in a way after which it can go on, else the server's error."""
        import grpc

        try:
            yield call
        except grpc.RpcError as fault:
            found = self.fault(fault)
            again = fault.code().name in BROKEN and not isinstance(found, PolicyError)
            raise (LinkError(str(found)) if again else found) from None
        finally:
            call.cancel()

    def forever(self, service: str, method: str, request: Any, advance: Callable[[Any], None]) -> Iterator[Any]:
        """The answers of an endless stream; after a break it is begun again with the ``request`` that ``advance`` moved on."""
        import grpc

        tries = Tries()
        while True:
            call = getattr(self.stub(service), method)(request)
            try:
                for answer in call:
                    tries.again()
                    advance(answer)
                    yield answer
                return
            except grpc.RpcError as fault:
                if fault.code().name not in BROKEN or not tries.wait():
                    raise self.fault(fault) from None
            finally:
                call.cancel()

    def fault(self, call: grpc.RpcError) -> FedpeftError:
        """What a failed call means; where no connection came about, what keeps it from being made."""
        from fedpeft.control.channel import why_not

        status: Any = call
        found = why_not(self.address, self.identity) if status.code().name == "UNAVAILABLE" else None
        return found or error_of(call, str(self.address))


class Tries:
    """Waits that double up to 5 s, with a random half; given up after `TRIES` of them without progress."""

    def __init__(self) -> None:
        self._count = 0

    def again(self) -> None:
        """There was progress."""
        self._count = 0

    def wait(self) -> bool:
        """Wait, or False when it was tried often enough."""
        if self._count >= TRIES:
            return False
        time.sleep(min(0.2 * 2.0**self._count, 5.0) * random.uniform(0.5, 1.0))
        self._count += 1
        return True
