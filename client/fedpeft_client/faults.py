"""What a site says of a fault: its name and the next step, never a row; details stay in the site's log."""

from __future__ import annotations

import logging

from fedpeft.errors import DataError, FedpeftError, PolicyError, PrivacyError
from fedpeft.wire.v1.federation_pb2 import TaskResult
from fedpeft_client import answers
from fedpeft_client.answers import Answer
from fedpeft_client.beginning import MissingVersion
from fedpeft_client.policy import RestingError
from fedpeft_client.rounds import WrongBase

log = logging.getLogger("fedpeft.worker")


def failure(task: str, fault: Exception, here: dict[str, str] | None = None) -> Answer:
    """The named failure for ``fault``; details that could quote a row stay in the site's log, and ``here``, by task."""
    log.error("task %s: %s: %s", task, type(fault).__name__, fault, exc_info=None if isinstance(fault, FedpeftError) else fault)
    if isinstance(fault, MissingVersion):
        return answers.without(task, TaskResult.STATUS_MISSING_VERSION, str(fault))
    if here is not None:
        here[task] = str(fault) if isinstance(fault, FedpeftError) else _reason(task, fault)
    if isinstance(fault, RestingError):
        resting = answers.without(task, TaskResult.STATUS_RESTING, str(fault))
        resting.result.rests = fault.seconds
        return resting
    if isinstance(fault, PolicyError | PrivacyError | WrongBase):
        return answers.without(task, TaskResult.STATUS_REFUSED, str(fault))
    return answers.without(task, TaskResult.STATUS_FAILED, _reason(task, fault))


def _reason(task: str, fault: Exception) -> str:
    name = type(fault).__name__
    if isinstance(fault, DataError):
        return f"{name}: the rows of task {task!r} cannot be used; its screen and worker.log say which row and why; mend it and join again"
    if isinstance(fault, FedpeftError):
        return f"{name}: {fault}"
    if isinstance(fault, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(fault):
        _free_memory()
        return f"OutOfMemory: task {task!r} does not fit into this site's memory; lower training.batch_size or base.max_tokens"
    if isinstance(fault, OSError):
        return f"StorageError: {fault.strerror}; free space or set `state` in site.toml to another disk"
    return f"{name}: a defect of fedpeft in task {task!r}; the site's worker.log has the traceback"


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
