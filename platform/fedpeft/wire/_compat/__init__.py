"""The only package with private Flower names (flwr 1.41); everybody else sees the thin dataclasses named here.

The coordinator serves the SuperLink's application (`link_app`), submits a stub bundle (`submit_stub`) and takes the run's
ServerApp task itself (`acquire_serverapp`, `LinkGrid`). A site's worker takes the ClientApp tasks of its SuperNode
(`acquire_clientapp`, `run_task`). tests/unit/wire/test_compat.py pins the private names and signatures.
"""

from fedpeft.wire._compat.base import ERRORS, OFFLINE, SECRET_HEADER, RunLost, link_faults
from fedpeft.wire._compat.keys import pem
from fedpeft.wire._compat.link import (
    Endpoint,
    LinkGrid,
    NodeRow,
    RunRow,
    Stub,
    acquire_serverapp,
    build_stub,
    link_app,
    list_nodes,
    list_runs,
    register_node,
    secret_header,
    stop_run,
    submit_stub,
    unregister_node,
)
from fedpeft.wire._compat.worker import Handler, TaskDone, TaskInfo, acquire_clientapp, run_task

__all__ = [
    "ERRORS",
    "OFFLINE",
    "SECRET_HEADER",
    "Endpoint",
    "Handler",
    "LinkGrid",
    "NodeRow",
    "RunLost",
    "RunRow",
    "Stub",
    "TaskDone",
    "TaskInfo",
    "acquire_clientapp",
    "acquire_serverapp",
    "build_stub",
    "link_app",
    "link_faults",
    "list_nodes",
    "list_runs",
    "pem",
    "register_node",
    "run_task",
    "secret_header",
    "stop_run",
    "submit_stub",
    "unregister_node",
]
