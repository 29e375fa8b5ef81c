"""What both sides need: faults, the runtime client, the heartbeat of a task."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from logging import getLogger
from types import ModuleType
from typing import Any

import httpx
from flwr.common.constant import ErrorCode
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient

from fedpeft.errors import LinkError

SECRET_HEADER = "x-fedpeft-secret"
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
BEAT_SECONDS = 10.0
"""A claimed task must be heard of within 30 s."""
GONE = frozenset({401, 403, 404, 410, 412})
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Environment of every Flower process: no phoning home, no installs."""
ERRORS: dict[int, str] = {value: name for name, value in vars(ErrorCode).items() if isinstance(value, int) and not name.startswith("_")}
"""Names of Flower's error codes."""

log = getLogger("fedpeft.flower")


class RunLost(LinkError):  # noqa: N818 - it says what happened, as its base does
    """The SuperLink or SuperNode no longer knows this run or task: trying again cannot help, a new run can."""


@contextmanager
def link_faults(what: str) -> Iterator[None]:
    """Translate what Flower's clients raise: `RunLost` when the run is gone, `LinkError` when trying again may help."""
    try:
        yield
    except RunNotRunningException:
        raise RunLost(f"{what}: the run is not running any more") from None
    except httpx.HTTPStatusError as fault:
        status, text = fault.response.status_code, fault.response.text[:200]
        kind = RunLost if status in GONE else LinkError
        raise kind(f"{what}: the other side answered {status} {text!r}") from None
    except httpx.TransportError as fault:
        raise LinkError(f"{what}: no connection ({type(fault).__name__}: {fault}); is the other side up?") from None
    except (ObjectPullError, ObjectPushError) as fault:
        raise LinkError(f"{what}: the transfer broke off: {fault}") from None


def impatient(module: ModuleType, name: str) -> None:
    """Make ``module`` look for arrays that are still on their way every 50 ms: Flower's first pause is 1 s, twice an exchange."""
    slow = getattr(module, name)
    if not isinstance(slow, partial):
        setattr(module, name, partial(slow, initial_backoff=0.05, backoff_cap=1.0, max_tries_per_object=None))


def runtime(address: str, component: str, extra: Sequence[Any]) -> RuntimeHttpClient:
    """A client without Flower's own retries: those wait for ever, and end the process on a 401."""
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=component), *extra],
    )


def acquire(address: str, kind: str, extra: Sequence[Any]) -> str | None:
    with link_faults(f"acquire {kind} at {address}"), runtime(address, "SuperExec", extra) as client:
        return client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind])).token or None


@contextmanager
def heartbeat(client: RuntimeHttpClient) -> Iterator[threading.Event]:
    """Beat until the block ends; the event is set when the other side disowns the task."""
    stop, disowned = threading.Event(), threading.Event()

    def beat() -> None:
        while not stop.is_set():
            try:
                if not client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                    disowned.set()
            except httpx.HTTPStatusError as fault:
                if fault.response.status_code in GONE:
                    disowned.set()
            except (httpx.HTTPError, RuntimeError) as fault:
                log.debug("heartbeat: %s", fault)
            stop.wait(BEAT_SECONDS)

    thread = threading.Thread(target=beat, name="flower-heartbeat", daemon=True)
    thread.start()
    try:
        yield disowned
    finally:
        stop.set()
        thread.join(timeout=5)
