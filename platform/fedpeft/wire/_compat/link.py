"""The coordinator's side: the SuperLink's application, the stub bundle, and a run's Grid in our own process."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import tomli_w
from flwr.app import Context
from flwr.cli.build import build_fab_from_files
from flwr.common.config import get_fused_config_from_fab
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import Grid
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid, http_grid

from fedpeft.wire._compat.base import ACQUIRE, SECRET_HEADER, acquire, heartbeat, impatient, link_faults, log, runtime


@dataclass(frozen=True)
class Endpoint:
    """A private listener: ``host:port`` and the secret that it asks for."""

    address: str
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class Stub:
    """A bundle without code: names of installed components and their settings."""

    serverapp: str
    clientapp: str
    config: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    name: str = "fedpeft-run"
    version: str = "1.0.0"


@dataclass(frozen=True)
class NodeRow:
    """A SuperNode as the SuperLink lists it; ``name`` is set for registered nodes only."""

    node: int
    status: str
    name: str


@dataclass(frozen=True)
class RunRow:
    """A run as the SuperLink lists it."""

    run: int
    status: str
    sub_status: str
    details: str


def link_app(secret: bytes, node_auth: bool, port: int) -> Any:
    """The SuperLink's ASGI application: process isolation, executor secret, state in memory."""
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app

    config = SuperLinkLifespanConfig(
        control_address="127.0.0.1:0", health_server_address=None, host="127.0.0.1", port=port, insecure=True, certificates=None,
        superexec_auth_secret=secret, authn_plugin=load_control_authn_plugin(), event_log_plugin=None,
        fleet_event_log_plugin=None, enable_event_log=False, artifact_provider=None, enable_supernode_auth=node_auth,
        fleet_api_type="grpc-rere", fleet_api_address=None, simulation=False, ssl_ca_certfile=None, ssl_certfile=None,
        ssl_keyfile=None, database=":flwr-in-memory:", isolation="process", runtime_dependency_install=False,
    )  # fmt: skip
    return create_app(config, SuperLinkLifespan)


class _Secret:
    """Adds the private listener's secret to each request."""

    def __init__(self, secret: bytes) -> None:
        self._value = secret_header(secret)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[SECRET_HEADER] = self._value
        return call_next(context)


def secret_header(secret: bytes) -> str:
    """What the private listener expects in `SECRET_HEADER`: a hash, so that the executor secret itself never travels."""
    return hashlib.sha256(b"fedpeft private listener" + secret).hexdigest()


@contextmanager
def _control(endpoint: Endpoint, what: str) -> Iterator[ControlHttpClient]:
    interceptors: list[Any] = [RuntimeVersionHttpInterceptor(component_name="flwr-cli"), _Secret(endpoint.secret)]
    with (
        link_faults(what),
        ControlHttpClient.from_server_address(
            server_address=endpoint.address, insecure=True, root_certificates=None, interceptors=interceptors
        ) as client,
    ):
        yield client


def build_stub(stub: Stub) -> bytes:
    """The bundle's bytes: one pyproject whose components are imported from the installed package."""
    app = {
        "publisher": "fedpeft",
        "components": {"serverapp": stub.serverapp, "clientapp": stub.clientapp},
        "config": dict(stub.config),
    }
    project = {"name": stub.name, "version": stub.version, "dependencies": ["flwr>=1.41.0,<1.42"]}
    files = {"pyproject.toml": tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}).encode()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # flwr's own use of pathspec
        return build_fab_from_files(files)[0]


def submit_stub(endpoint: Endpoint, stub: Stub) -> int:
    """Start a run of ``stub``; returns its id. Raises `LinkError` when the SuperLink cannot be reached or refuses."""
    content = build_stub(stub)
    fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    with _control(endpoint, "start run") as client:
        return int(client.StartRun(StartRunRequest(fab=fab, override_config=user_config_to_proto({}))).run_id)


def stop_run(endpoint: Endpoint, run: int) -> None:
    """End a run; its messages are dropped."""
    with _control(endpoint, "stop run") as client:
        client.StopRun(StopRunRequest(run_id=run))


def list_runs(endpoint: Endpoint) -> list[RunRow]:
    """All runs that the SuperLink knows."""
    with _control(endpoint, "list runs") as client:
        runs = client.ListRuns(ListRunsRequest()).run_dict
    return [RunRow(key, run.status.status, run.status.sub_status, run.status.details) for key, run in sorted(runs.items())]


def list_nodes(endpoint: Endpoint) -> list[NodeRow]:
    """All SuperNodes that the SuperLink knows."""
    with _control(endpoint, "list nodes") as client:
        return [NodeRow(node.node_id, node.status, node.name) for node in client.ListNodes(ListNodesRequest()).nodes_info]


def register_node(endpoint: Endpoint, key: bytes, name: str) -> int:
    """Admit the SuperNode whose public key (ECDSA on a NIST curve, in PEM) is ``key``, under ``name``; returns its node id."""
    with _control(endpoint, f"register node {name}") as client:
        return int(client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id)


def unregister_node(endpoint: Endpoint, node: int, name: str) -> None:
    """Shut out a registered SuperNode: its calls are refused from now on, and its key is taken no more until the SuperLink starts anew."""
    with _control(endpoint, f"unregister node {name}") as client:
        client.UnregisterNode(UnregisterNodeRequest(node_id=node))


def acquire_serverapp(endpoint: Endpoint) -> str | None:
    """Take the oldest waiting ServerApp task; its token, or None. Raises `LinkError` (`RunLost` for a wrong secret)."""
    signer = SuperExecAuthHttpInterceptor(master_secret=endpoint.secret, protected_methods=frozenset({ACQUIRE}))
    return acquire(endpoint.address, "flwr-serverapp", [signer, _Secret(endpoint.secret)])


class LinkGrid:
    """A run's Grid in this process, against a SuperLink in process isolation; a context manager.

    One at a time per process: Flower keeps the identity of the task in a class attribute.
    """

    def __init__(self, endpoint: Endpoint, token: str) -> None:
        impatient(http_grid, "pull_objects")
        self._http = HttpGrid(endpoint.address, insecure=True, token=token)
        self._client = runtime(endpoint.address, "flwr-serverapp", [RuntimeTokenHttpInterceptor(token), _Secret(endpoint.secret)])
        self._http._client = self._client
        self._beating: Any = None
        self._disowned = threading.Event()
        self.context: Context
        self.run_id = 0

    @property
    def grid(self) -> Grid:
        """The public Grid."""
        return self._http

    @property
    def lost(self) -> bool:
        """Whether the SuperLink has disowned the run."""
        return self._disowned.is_set()

    def __enter__(self) -> LinkGrid:
        with link_faults("pull the run"):
            given = self._client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, given.run.run_id, given.context.node_id
        run = run_from_proto(given.run)
        self.context, self.run_id = context_from_proto(given.context), int(run.run_id)
        self.context.run_config = get_fused_config_from_fab(given.fab.content, run)
        self._http.set_run(run)
        self._beating = heartbeat(self._client)
        self._disowned = self._beating.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _trace: object) -> None:
        self.close("" if kind is None else kind.__name__)

    def close(self, fault: str = "") -> None:
        """End the run; ``fault`` names what failed, if something did."""
        if self._beating is None:
            return
        self._beating.__exit__(None, None, None)
        self._beating = None
        status = SubStatus.FAILED if fault else SubStatus.COMPLETED
        try:
            self._client.PushTaskOutput(PushTaskOutputRequest(context=context_to_proto(self.context), sub_status=status, details=fault))
        except httpx.HTTPError as error:
            log.debug("push of the run's end: %s", error)
        self._http.close()
