"""The site's side: take the SuperNode's ClientApp tasks in a long-lived process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supernode.runtime import run_clientapp
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedpeft.wire._compat.base import ACQUIRE, acquire, heartbeat, impatient, link_faults, log, runtime


def acquire_clientapp(address: str, secret: bytes | None) -> str | None:
    """Take the oldest waiting ClientApp task of the SuperNode whose Runtime API is at ``address``; its token, or None."""
    signer = [SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({ACQUIRE}))] if secret else []
    return acquire(address, "flwr-clientapp", signer)


@dataclass(frozen=True)
class TaskInfo:
    """What a handler may know of the message it answers."""

    run_id: int
    node_id: int
    message_id: str
    message_type: str
    group: str
    run_config: Mapping[str, Any]
    node_config: Mapping[str, Any]


@dataclass(frozen=True)
class TaskDone:
    """A task that was answered; ``fault`` is what the handler raised, if it did (the other side only learns its type)."""

    info: TaskInfo
    fault: Exception | None = None


Handler = Callable[[RecordDict, TaskInfo], RecordDict]


def run_task(address: str, token: str, handler: Handler) -> TaskDone:
    """Pull the task of ``token``, answer it with ``handler``, push the answer; a heartbeat thread runs meanwhile.

    When the handler raises, an error reply with the exception's type and nothing else leaves the site.

    Raises:
        LinkError: the SuperNode went away; the answer is lost (the coordinator asks again).
    """
    impatient(run_clientapp, "pull_and_inflate_object_from_tree")
    client = runtime(address, "flwr-clientapp", [RuntimeTokenHttpInterceptor(token)])
    with client, heartbeat(client), link_faults(f"task of {address}"):
        message, context, _, _ = pull_task_input(client)
        info = _info(message, context)
        reply, fault = _answer(handler, message, info)
        push_message(client, reply, context)
        status = SubStatus.FAILED if fault else SubStatus.COMPLETED
        push_task_output(client, context, status, type(fault).__name__ if fault else "")
        return TaskDone(info, fault)


def _info(message: Message, context: Context) -> TaskInfo:
    meta = message.metadata
    return TaskInfo(
        context.run_id, context.node_id, meta.message_id, meta.message_type, meta.group_id, context.run_config, context.node_config
    )


def _answer(handler: Handler, message: Message, info: TaskInfo) -> tuple[Message, Exception | None]:
    try:
        return Message(handler(message.content, info), reply_to=message), None
    except Exception as fault:  # noqa: BLE001 - the edge: whatever a handler raises is answered
        log.exception("task %s failed", info.message_id)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(fault).__name__), reply_to=message), fault
