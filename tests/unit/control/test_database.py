"""Histories in a database: the laws of `fedpeft.registry.histories`, a whole registry, and many writers.

Runs on SQLite, and on Postgres where FEDPEFT_TEST_DATABASE names an empty database.
"""

from __future__ import annotations

import os
import threading
import uuid
from types import SimpleNamespace

import pytest

from fedpeft.errors import LinkError, StorageError
from fedpeft.registry import Manifest, Registry, open_store
from fedpeft_coordinator.control import process
from fedpeft_coordinator.control.config import Control
from fedpeft_coordinator.control.database import SCHEMA, SqlHistories
from fedpeft_coordinator.control.opening import open_registry

POSTGRES = os.environ.get("FEDPEFT_TEST_DATABASE", "")
NEEDS = pytest.mark.skipif(not POSTGRES, reason="set FEDPEFT_TEST_DATABASE to an SQLAlchemy URL of an empty Postgres database")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=NEEDS)])
def url(request, tmp_path):
    found = f"sqlite:///{tmp_path}/deep/registry.sqlite" if request.param == "sqlite" else POSTGRES
    yield found
    lists = SqlHistories(found)
    SCHEMA.drop_all(lists._engine)
    lists.close()


@pytest.fixture
def registry(url, tmp_path):
    """Closed after whatever serves it was ended: fixtures that are asked for later end earlier."""
    found = open_registry(tmp_path / "registry", Control(store=f"memory://{uuid.uuid4().hex}", database=url))
    yield found
    found.histories.close()


@pytest.fixture
def lists(url):
    found = SqlHistories(url)
    yield found
    found.close()


def test_a_line_is_appended_at_its_place_or_not_at_all(lists):
    before = lists.stamp()
    assert lists.lines("refs/a/log") == []
    assert not lists.append("refs/a/log", 1, b"early")
    assert lists.append("refs/a/log", 0, b"one")
    assert not lists.append("refs/a/log", 0, b"late")
    assert lists.append("refs/a/log", 1, b"two\xff")
    assert lists.append("refs/b/log", 0, b"other")
    assert lists.lines("refs/a/log") == [b"one", b"two\xff"]
    assert lists.names() == ("refs/a/log", "refs/b/log")
    assert lists.stamp() != before


def test_of_many_writers_at_one_place_one_wins(url):
    won, together = [], threading.Barrier(6, timeout=20)

    def write(mark):
        own = SqlHistories(url)
        together.wait()
        for place in range(5):
            if own.append("refs/a/log", place, mark):
                won.append((place, mark))
        own.close()

    threads = [threading.Thread(target=write, args=(str(place).encode(),)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = SqlHistories(url)
    assert list(enumerate(lines.lines("refs/a/log"))) == sorted(won)
    assert [place for place, _ in sorted(won)] == list(range(len(won)))
    assert won
    lines.close()


def test_a_registry_over_a_database_and_a_url_is_the_same_registry(url, tmp_path, made):
    control = Control(store=f"memory://{uuid.uuid4().hex}", database=url)
    registry = open_registry(tmp_path / "registry", control)
    first, second = made.fill(registry, 1, 2)
    assert registry.alias("area", "prod", "1").number == 1
    assert registry.rollback("area", "prod").number == 3
    again = open_registry(tmp_path / "registry", control)
    assert [version.digest for version in again.list()] == [first.digest, second.digest]
    assert again.publish(made.adapter(1), first.manifest, "run/1/area") == first
    assert again.load("area@prod").digest == made.adapter(1).digest
    assert again.verify() == ()
    assert first.path is None
    for one in (registry, again):
        one.histories.close()


def test_the_default_of_a_url_is_sqlite_beside_the_keys(tmp_path, made):
    registry = open_registry(tmp_path / "registry", Control(store=f"file://{tmp_path}/bucket"))
    made.fill(registry, 1)
    assert (tmp_path / "registry/registry.sqlite").exists()
    assert len(open_store(f"file://{tmp_path}/bucket").names()) == 1
    registry.histories.close()
    assert open_registry(tmp_path / "plain", Control()) == Registry(tmp_path / "plain")


def test_a_database_that_cannot_be_opened_is_named_without_its_password(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for url in ("nosuch://x", "not a url", f"sqlite:///{tmp_path}/file/x.sqlite"):
        with pytest.raises(StorageError, match="cannot be opened"):
            SqlHistories(url)
    with pytest.raises(StorageError) as caught:
        SqlHistories("postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)


@pytest.mark.integration
def test_a_server_over_a_database_serves_and_takes_versions(registry, serve, made, tmp_path):
    running = serve(registry)
    (first,) = made.fill(registry, 1)
    other = Registry(tmp_path / "other")
    other.publish(made.adapter(2), Manifest(), "x")
    registry.objects.keys.trust(other.objects.keys.public())
    with (far := running.far(tmp_path / "cache")).link:
        assert far.load("area").digest == made.adapter(1).digest
        assert far.push(other, "area").number == 2
        assert far.alias("area", "prod", "1").digest == first.digest
        assert far.load("area").digest == made.adapter(2).digest


def test_a_control_plane_closes_its_database_however_it_ends(monkeypatch, tmp_path):
    closed = []
    control = Control(store=f"memory://{uuid.uuid4().hex}")
    settings = SimpleNamespace(registry=tmp_path, control=control, state=tmp_path, federation=None)
    close = SqlHistories.close

    class Server:
        def __init__(self, *_arguments, **_settings):
            pass

        async def run(self, _told):
            raise LinkError("taken")

    monkeypatch.setattr(SqlHistories, "close", lambda self: closed.append(close(self)))
    monkeypatch.setattr("fedpeft_coordinator.control.serve.Server", Server)
    with pytest.raises(LinkError):
        process.run(settings, print)
    assert closed == [None]
