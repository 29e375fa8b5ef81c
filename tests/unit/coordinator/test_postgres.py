"""The journal on Postgres: the same rounds, the same bits. Runs where FEDPEFT_TEST_DATABASE names an empty database."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

URL = os.environ.get("FEDPEFT_TEST_DATABASE", "")


@pytest.mark.skipif(not URL, reason="set FEDPEFT_TEST_DATABASE to an SQLAlchemy URL of an empty Postgres database (extra: postgres)")
def test_rounds_are_journalled_in_postgres_and_resumed_from_it(fake: ModuleType, tmp_path: Path) -> None:
    from sqlalchemy import NullPool, create_engine

    from fedpeft_coordinator import journal

    on_sqlite = fake.Federation(tmp_path / "sqlite", fake.setup(), fake.sites())
    (tmp_path / "sqlite").mkdir()
    on_sqlite.open().run()
    federation = fake.Federation(tmp_path / "postgres", fake.setup(), fake.sites(), url=URL)
    try:
        first = federation.open()
        for _ in range(7):
            first.step()
        federation.open().run()
        assert federation.final() == on_sqlite.final()
    finally:
        journal.SCHEMA.drop_all(create_engine(URL, poolclass=NullPool))
