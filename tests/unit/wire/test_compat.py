"""Contract with flwr 1.41: every private name that `fedpeft.wire._compat` uses, with the parameters it passes."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from fedpeft.errors import LinkError
from fedpeft.wire import _compat

FOLDER = Path(_compat.__file__).parent
PLATFORM = FOLDER.parents[1]
PUBLIC = {"flwr.app", "flwr.serverapp", "flwr.clientapp", "flwr.clientapp.mod", "flwr.serverapp.strategy"}

SIGNATURES: dict[str, set[str]] = {
    "flwr.cli.build:build_fab_from_files": {"files"},
    "flwr.common.config:get_fused_config_from_fab": {"fab_file", "run"},
    "flwr.supercore.fab:Fab": {"hash_str", "content", "verifications"},
    "flwr.supercore.interceptors:RuntimeTokenHttpInterceptor": {"token"},
    "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor": {"component_name"},
    "flwr.supercore.interceptors:SuperExecAuthHttpInterceptor": {"master_secret", "protected_methods"},
    "flwr.superlink.grid:HttpGrid": {"runtime_api_address", "insecure", "token"},
    "flwr.superlink.main:create_app": {"config", "superlink_lifespan_class"},
    "flwr.supernode.runtime.run_clientapp:pull_task_input": {"client"},
    "flwr.supernode.runtime.run_clientapp:push_message": {"client", "message", "context"},
    "flwr.supernode.runtime.run_clientapp:push_task_output": {"client", "context", "sub_status", "details"},
    "flwr.supernode.runtime.run_clientapp:pull_and_inflate_object_from_tree": {"initial_backoff", "backoff_cap", "max_tries_per_object"},
    "flwr.superlink.grid.http_grid:pull_objects": {"initial_backoff", "backoff_cap", "max_tries_per_object"},
}
LIFESPAN = {
    "control_address", "health_server_address", "host", "port", "insecure", "certificates", "superexec_auth_secret", "authn_plugin",
    "event_log_plugin", "fleet_event_log_plugin", "enable_event_log", "artifact_provider", "enable_supernode_auth", "fleet_api_type",
    "fleet_api_address", "simulation", "ssl_ca_certfile", "ssl_certfile", "ssl_keyfile", "database", "isolation",
    "runtime_dependency_install",
}  # fmt: skip
ROUTES = {"/v1/fleet/pull-messages", "/v1/runtime/push-messages", "/v1/runtime/push-object", "/health", "/v1/control/start-run"}


def private_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flwr":
            names |= {f"{node.module}:{alias.name}" for alias in node.names if node.module not in PUBLIC}
        if isinstance(node, ast.Import):
            names |= {f"{alias.name}:" for alias in node.names if alias.name.split(".")[0] == "flwr" and alias.name not in PUBLIC}
    return names


def test_the_pinned_minor() -> None:
    assert version("flwr").split(".")[:2] == ["1", "41"]


def test_private_names_exist() -> None:
    for name in sorted(set().union(*map(private_imports, FOLDER.glob("*.py")))):
        module, _, attribute = name.partition(":")
        assert hasattr(importlib.import_module(module), attribute), name


def test_nobody_else_imports_private_names() -> None:
    roots = [PLATFORM, PLATFORM.parents[1] / "client", PLATFORM.parents[1] / "coordinator"]
    files = [path for root in roots for path in root.rglob("*.py") if FOLDER not in path.parents]
    assert len(files) > 50
    assert {str(path): found for path in files if (found := private_imports(path))} == {}


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_parameters(name: str) -> None:
    module, _, attribute = name.partition(":")
    found = set(inspect.signature(getattr(importlib.import_module(module), attribute)).parameters)
    assert SIGNATURES[name] <= found


def test_settings_of_the_superlink() -> None:
    from flwr.superlink.config_loader import SuperLinkLifespanConfig

    assert {field.name for field in dataclasses.fields(SuperLinkLifespanConfig)} == LIFESPAN


def test_routes_that_the_guard_names() -> None:
    app = _compat.link_app(b"secret", False, 1)
    assert set(app.openapi()["paths"]) >= ROUTES


def test_error_codes() -> None:
    named = {"NODE_UNAVAILABLE", "CLIENT_APP_CRASHED", "MESSAGE_UNAVAILABLE", "REPLY_MESSAGE_UNAVAILABLE", "CLIENT_APP_RAISED_EXCEPTION"}
    assert named <= set(_compat.ERRORS.values())


def test_the_stub_holds_no_code() -> None:
    import io
    import zipfile

    content = _compat.build_stub(_compat.Stub("a.b:app", "c.d:app", {"rounds": 3}))
    assert content == _compat.build_stub(_compat.Stub("a.b:app", "c.d:app", {"rounds": 3}))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "pyproject.toml"]


@pytest.mark.parametrize(("status", "kind"), [(401, _compat.RunLost), (403, _compat.RunLost), (500, LinkError), (503, LinkError)])
def test_faults_are_sorted_into_lost_and_worth_a_retry(status: int, kind: type[LinkError]) -> None:
    request = httpx.Request("POST", "http://127.0.0.1")
    with pytest.raises(LinkError, match=f"pull: the other side answered {status}") as caught, _compat.link_faults("pull"):
        raise httpx.HTTPStatusError("x", request=request, response=httpx.Response(status, request=request))
    assert type(caught.value) is kind
    with pytest.raises(LinkError, match="no connection"), _compat.link_faults("pull"):
        raise httpx.ConnectError("refused")


def test_the_listener_secret_does_not_tell_the_executor_secret() -> None:
    assert _compat.secret_header(b"a") != _compat.secret_header(b"b")
    assert b"a".hex() not in _compat.secret_header(b"a")[:4]
    assert "a-secret" not in repr(_compat.Endpoint("127.0.0.1:1", b"a-secret"))


def test_a_handler_that_raises_tells_its_type_only() -> None:
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from fedpeft.wire._compat import worker

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 1
    message = Message(RecordDict({"x": ConfigRecord({"a": 1})}), 7, "train.fedpeft")
    message.metadata.__dict__["_message_id"] = "m"

    def leak(_records: RecordDict, _info: _compat.TaskInfo) -> RecordDict:
        raise ValueError("a private row")

    info = _compat.TaskInfo(2, 7, "m", "train.fedpeft", "", {}, {})
    reply, fault = worker._answer(leak, message, info)
    assert isinstance(fault, ValueError)
    assert reply.error.reason == "ValueError"


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_openssh_keys_become_the_pem_that_nodes_show(curve: str, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    from fedpeft.wire._compat.keys import pem

    key = ec.generate_private_key(getattr(ec, curve)()).public_key()
    path = tmp_path / "site.pub"
    path.write_bytes(key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b" someone@host\n")
    assert pem(path) == public_key_to_bytes(key)


@pytest.mark.parametrize(
    "text", ["", "nonsense", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA==", "ecdsa-sha2-nistp384 AAAA", "ecdsa-sha2-nistp384 %%"]
)
def test_other_files_are_named(text: str, tmp_path: Path) -> None:
    from fedpeft.errors import ConfigError
    from fedpeft.wire._compat.keys import pem

    (tmp_path / "site.pub").write_text(text)
    with pytest.raises(ConfigError, match=r"site\.pub: is not an OpenSSH ECDSA public key"):
        pem(tmp_path / "site.pub")
