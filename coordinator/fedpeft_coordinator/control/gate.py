"""What every call passes: who calls, whether the role may, how many at once, how long; and our errors as statuses."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import grpc.aio

from fedpeft.certificates import Holder, holder
from fedpeft.control import bounds, faults
from fedpeft.control.roles import ALLOWED, may
from fedpeft.errors import ConfigError, FedpeftError
from fedpeft_coordinator.control.tokens import Tokens

LOG = logging.getLogger("fedpeft.control")
UNARY = 60.0
"""Seconds that a call which answers once may take here, whatever its caller allows."""
STALL = 60.0
"""Seconds that a stream may wait for its other end to take or send one message."""
SLOTS = {"Pull": (512, 256), "Push": (32, 8), "Watch": (1024, 256), "Events": (64, 16), "Route": (64, 32)}
"""Calls at once by method: in all, and of one caller. A pull holds about two chunks (2 MiB) of memory, a push one."""
OTHERS = (512, 256)
RECORDED = frozenset({"Push", "Rollback", "SetAlias"})
Record = Callable[..., None]


@dataclass(frozen=True)
class Caller:
    """Who calls: its certificate's role and name, or the role of those without one; and the only ``tasks`` it may see, None for all."""

    role: str
    name: str
    tasks: frozenset[str] | None = None

    @property
    def label(self) -> str:
        """For logs and aliases."""
        return f"{self.role}:{self.name}"

    def sees(self, task: str) -> bool:
        """Whether ``task`` is within its scope."""
        return self.tasks is None or task in self.tasks

    def permit(self, *tasks: str) -> None:
        """Raise `DeniedError` when one of ``tasks`` is beyond its scope."""
        beyond = [task for task in tasks if not self.sees(task)]
        if beyond:
            raise DeniedError(f"{self.label} may see and change {sorted(self.tasks or ())} only, not {beyond} (control.scopes)")


CALLER: ContextVar[Caller] = ContextVar("caller")
"""Who made the call that this task answers."""


@dataclass
class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every method; ``anonymous`` is the role of callers without TLS, ``record`` hears of what was changed and refused.

    With ``tokens`` callers show one instead of a certificate. ``revoked`` are callers (ROLE:NAME) whose certificates or tokens count no
    longer, however long they are valid. ``scopes`` are the tasks of a caller (ROLE:NAME) or of a role, where it may not see all.
    """

    anonymous: str
    record: Record = lambda *_a, **_k: None
    revoked: frozenset[str] = frozenset()
    tokens: Tokens | None = None
    scopes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    stall: float = STALL
    slots: dict[str, tuple[int, int]] = field(default_factory=lambda: dict(SLOTS))
    _busy: Counter[tuple[str, str]] = field(default_factory=Counter)
    _known: dict[bytes, Holder] = field(default_factory=dict)

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], details: Any) -> Any:
        """The method's handler behind the gate."""
        handler = await continuation(details)
        return handler and self._wrapped(handler, details.method)

    def _wrapped(self, handler: Any, method: str) -> Any:
        kinds = {"request_deserializer": handler.request_deserializer, "response_serializer": handler.response_serializer}
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._streaming(handler.stream_stream, method), **kinds)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._answering(handler.stream_unary, method, None), **kinds)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._streaming(handler.unary_stream, method), **kinds)
        return grpc.unary_unary_rpc_method_handler(self._answering(handler.unary_unary, method, UNARY), **kinds)

    def _answering(self, behaviour: Any, method: str, seconds: float | None) -> Any:
        async def call(request: Any, context: Any) -> Any:
            try:
                with self._admitted(method, context) as caller:
                    _bounded(request)
                    async with asyncio.timeout(seconds):
                        answer = await behaviour(request, context)
                    self._note(method, caller.label, "ok")
                    return answer
            except grpc.aio.AbortError:
                raise
            except Exception as fault:  # noqa: BLE001 - the edge of the process
                await self._refuse(method, context, fault)

        return call

    def _streaming(self, behaviour: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> None:
            try:
                with self._admitted(method, context) as caller:
                    _bounded(request)
                    LOG.debug("%s by %s", method, caller.label)
                    answers = behaviour(request, context)
                    await (self._send(answers, context) if hasattr(answers, "__aiter__") else answers)
            except grpc.aio.AbortError:
                raise
            except Exception as fault:  # noqa: BLE001 - the edge of the process
                await self._refuse(method, context, fault)

        return call

    async def _send(self, answers: AsyncGenerator[Any, None], context: Any) -> None:
        """A reader that takes nothing for too long loses its slot."""
        async with aclosing(answers) as open_answers:
            async for answer in open_answers:
                try:
                    async with asyncio.timeout(self.stall):
                        await context.write(answer)
                except TimeoutError:
                    raise StalledError(f"nothing was read for {self.stall:.0f} s; go on where it stopped") from None

    @contextmanager
    def _admitted(self, method: str, context: Any) -> Iterator[Caller]:
        caller = self._caller(context)
        if not may(caller.role, method):
            raise DeniedError(
                f"role {caller.role!r} ({caller.name}) may not call {method.lstrip('/')}; {sorted(ALLOWED.get(method, ()))} may"
            )
        name = method.rsplit("/", 1)[-1]
        most, own = self.slots.get(name, OTHERS)
        keys = ((name, ""), (name, caller.label))
        if self._busy[keys[0]] >= most or self._busy[keys[1]] >= own:
            raise FullError(f"{name}: {self._busy[keys[0]]} calls are under way ({self._busy[keys[1]]} of {caller.label}); try again soon")
        self._busy.update(keys)
        CALLER.set(caller)
        try:
            yield caller
        finally:
            self._busy.subtract(keys)

    def _caller(self, context: Any) -> Caller:
        shown = context.auth_context()
        if self.tokens is None and b"ssl" not in shown.get("transport_security_type", ()):
            return self._scoped(Caller(self.anonymous, "anonymous"))
        what, found = ("certificate", self._certified(shown)) if self.tokens is None else ("token", self._holding(self.tokens, context))
        fault = found.fault() or ("was revoked (control.revoked)" if found.label in self.revoked else None)
        if fault:
            raise UnknownCallerError(f"the {what} of {found.label if found.role else 'the caller'} {fault}")
        return self._scoped(Caller(found.role, found.name))

    def _scoped(self, caller: Caller) -> Caller:
        return replace(caller, tasks=self.scopes.get(caller.label, self.scopes.get(caller.role)))

    def _certified(self, shown: Any) -> Holder:
        pem = next(iter(shown.get("x509_pem_cert", ())), None)
        if pem is None:
            raise UnknownCallerError("no certificate was shown; give one with a role")
        if pem not in self._known:
            if len(self._known) > 10_000:
                self._known.clear()
            self._known[pem] = holder(pem)
        return self._known[pem]

    @staticmethod
    def _holding(tokens: Tokens, context: Any) -> Holder:
        shown = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        if len(shown) != 1 or not str(shown[0]).startswith("Bearer "):
            raise UnknownCallerError("no token was shown; give --identity NAME.token")
        try:
            found = tokens.holder(str(shown[0]).removeprefix("Bearer "))
        except ConfigError as fault:
            LOG.error("%s", fault)
            raise UnknownCallerError("tokens cannot be read here now; ask the operator") from None
        if found is None:
            raise UnknownCallerError("this token is not known here (control.tokens); ask the operator for one")
        return found

    async def _refuse(self, method: str, context: Any, fault: Exception) -> None:
        code, detail = _status(fault)
        if code == "INTERNAL":
            LOG.exception("%s: a defect", method)
        self._note(method, CALLER.get(Caller("", context.peer())).label, f"{code}: {detail}")
        kind = next((kind.__name__ for kind in type(fault).__mro__ if kind.__module__ == "fedpeft.errors"), "")
        metadata = ((faults.KEY, kind),) if kind and kind != "FedpeftError" else ()
        await context.abort(grpc.StatusCode[code], detail[:2000], metadata)

    def _note(self, method: str, who: str, outcome: str) -> None:
        name = method.rsplit("/", 1)[-1]
        if name in RECORDED or outcome.startswith(("PERMISSION", "UNAUTH", "INTERNAL")):
            self.record("call", method=method.lstrip("/"), caller=who, outcome=outcome)


class StatusError(FedpeftError):
    """A fault that has a status and no place among the errors of files and adapters."""

    code = "INTERNAL"


class StalledError(StatusError):
    """The other end neither reads nor sends."""

    code = "ABORTED"


class DeniedError(StatusError):
    """The caller's role may not."""

    code = "PERMISSION_DENIED"


class UnknownCallerError(StatusError):
    """The caller shows no certificate that holds."""

    code = "UNAUTHENTICATED"


class FullError(StatusError):
    """As many are at work as may be."""

    code = "RESOURCE_EXHAUSTED"


class AbsentError(StatusError):
    """This server has no such part."""

    code = "UNIMPLEMENTED"


def _bounded(request: Any) -> None:
    descriptor = getattr(request, "DESCRIPTOR", None)
    if descriptor is not None and descriptor.full_name.startswith("fedpeft."):
        bounds.check(request)


def _status(fault: Exception) -> tuple[str, str]:
    if isinstance(fault, StatusError):
        return fault.code, str(fault)
    if isinstance(fault, FedpeftError):
        return faults.code_of(fault), str(fault)
    if isinstance(fault, TimeoutError):
        return "DEADLINE_EXCEEDED", f"took longer than {UNARY:.0f} s here"
    return "INTERNAL", f"a defect of fedpeft: {type(fault).__name__}; the server's log has more"
