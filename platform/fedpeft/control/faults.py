"""Our errors as gRPC statuses and back: the class travels beside the status, so that a far fault ends with the exit code of a near one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpeft import errors
from fedpeft.errors import AdapterError, BaseError, ConfigError, FedpeftError, LinkError, PolicyError, StorageError

if TYPE_CHECKING:
    import grpc

KEY = "fedpeft-fault"
"""Trailing metadata with the name of the error's class."""
CODES: dict[type[FedpeftError], str] = {
    AdapterError: "INVALID_ARGUMENT",
    ConfigError: "INVALID_ARGUMENT",
    BaseError: "FAILED_PRECONDITION",
    PolicyError: "PERMISSION_DENIED",
    LinkError: "UNAVAILABLE",
    StorageError: "DATA_LOSS",
}
"""Status by error; others are FAILED_PRECONDITION."""
CLASSES: dict[str, type[FedpeftError]] = {
    "INVALID_ARGUMENT": AdapterError,
    "NOT_FOUND": AdapterError,
    "FAILED_PRECONDITION": BaseError,
    "PERMISSION_DENIED": PolicyError,
    "UNAUTHENTICATED": PolicyError,
    "DATA_LOSS": StorageError,
}
"""Error by status, where no class travels beside it; others are `LinkError`."""
AGAIN = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"})
"""Statuses after which the same call may succeed later, when it changes nothing or goes on where it stopped."""


class UnknownError(AdapterError):
    """What was asked for is not there: NOT_FOUND."""


def code_of(fault: FedpeftError) -> str:
    """Name of the status for ``fault``."""
    if isinstance(fault, UnknownError):
        return "NOT_FOUND"
    return next((CODES[kind] for kind in type(fault).__mro__ if kind in CODES), "FAILED_PRECONDITION")


def error_of(call: grpc.RpcError, address: str) -> FedpeftError:
    """The error that a failed call stands for."""
    status: Any = call
    code, detail = status.code().name, status.details() or "no detail"
    kind = getattr(errors, dict(status.trailing_metadata() or ()).get(KEY, ""), None)
    if isinstance(kind, type) and issubclass(kind, FedpeftError):
        return kind(detail)
    if code == "DEADLINE_EXCEEDED":
        return LinkError(f"{address}: did not answer in time ({detail}); try again later")
    return CLASSES.get(code, LinkError)(f"{address}: {detail} ({code})")
