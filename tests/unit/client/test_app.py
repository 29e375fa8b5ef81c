"""The ClientApp of plain `flwr run`: one warm worker per site file; and the Flower processes' settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.errors import ConfigError
from fedpeft.wire import Envelope, flower
from fedpeft.wire.v1.federation_pb2 import Capabilities, Hello, TaskResult
from fedpeft_client import app as room
from fedpeft_client import join
from fedpeft_client.config import load_site


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Messages take run and node from the process's task."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    room._workers.clear()
    yield
    room._workers.clear()


def ask(envelope: Envelope, **node_config: str) -> Envelope:
    message = flower.request(envelope, 7, "1", 60.0)
    message.metadata.__dict__["_message_id"] = "m"
    return flower.from_records(room.app(message, Context(1, 7, dict(node_config), RecordDict(), {})).content)


def test_the_app_answers_all_kinds_with_one_worker(site_file: Path, make_worker: Callable, plans) -> None:
    room._workers[str(site_file)] = worker = make_worker(load_site(site_file))
    given = ask(Envelope.of("hello", Hello(federation="f")), site=str(site_file)).open(Capabilities)
    assert (given.site, given.instance) == ("site-a", worker.instance)
    for kind in ("train", "evaluate"):
        reply = ask(plans.message(plans.of(), kind=kind), site=str(site_file))
        assert plans.results(reply)["kinds"].status == TaskResult.STATUS_OK
    assert list(room._workers) == [str(site_file)]


def test_a_node_that_names_no_site_is_told_how(site_file: Path) -> None:
    message = Message(RecordDict(), 7, "query.fedpeft")
    message.metadata.__dict__["_message_id"] = "m"
    with pytest.raises(ConfigError, match="node-config"):
        room.answer(message, Context(1, 7, {}, RecordDict(), {}))


def test_flower_is_kept_offline_and_inside_the_state_folder(site_file: Path) -> None:
    site = load_site(site_file)
    env = join.environment(site)
    assert (env["FLWR_TELEMETRY_ENABLED"], env["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
    assert env["FLWR_HOME"] == str(site.state / "flower")
    assert env["OMP_NUM_THREADS"] == "1"
    node, worker = join.children(site_file, site)
    assert "process" in node.command
    assert (site.state / "secret").stat().st_mode & 0o777 == 0o600
    assert worker.command[-1] == str(site.state / "secret")
    assert not any((site.state / "secret").read_text() in part for part in (*node.command, *worker.command))
