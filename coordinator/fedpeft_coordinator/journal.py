"""The journal: every step of every round, committed before the next begins. SQLite by default; any SQLAlchemy URL works."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from sqlalchemy import JSON, Column, Connection, Integer, MetaData, String, Table, delete, insert, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from fedpeft.errors import StorageError
from fedpeft_coordinator.sql import open_engine
from fedpeft_coordinator.state import Round, Site, TaskRound

SCHEMA = MetaData()
ROUNDS = Table(
    "rounds",
    SCHEMA,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("attempt", Integer, nullable=False),
    Column("step", String(16), nullable=False),
    Column("tasks", JSON, nullable=False),
)
SITES = Table("sites", SCHEMA, Column("name", String(64), primary_key=True), Column("facts", JSON, nullable=False))
NOTES = Table("notes", SCHEMA, Column("key", String(64), primary_key=True), Column("value", JSON, nullable=False))


class Journal:
    """Opens, or creates, the journal at an SQLAlchemy URL. Raises `StorageError` when it cannot."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url, "journal", "sqlite:///state/journal.sqlite", poolclass=NullPool)
        with self._begin() as connection:
            SCHEMA.create_all(connection)

    def save(self, step: Round) -> None:
        """Commit one step of one round, replacing the step before. Raises `StorageError`."""
        with self._begin() as connection:
            connection.execute(delete(ROUNDS).where(ROUNDS.c.number == step.number))
            connection.execute(insert(ROUNDS).values(number=step.number, attempt=step.attempt, step=step.step, tasks=step.to_json()))

    def rounds(self) -> list[Round]:
        """All rounds, oldest first."""
        with self._begin() as connection:
            rows = connection.execute(select(ROUNDS).order_by(ROUNDS.c.number)).all()
        return [_round(row) for row in rows]

    def last(self) -> Round | None:
        """The youngest round, if there is one."""
        with self._begin() as connection:
            row = connection.execute(select(ROUNDS).order_by(ROUNDS.c.number.desc()).limit(1)).first()
        return None if row is None else _round(row)

    def save_sites(self, sites: Iterable[Site]) -> None:
        """Replace what is known of ``sites``."""
        with self._begin() as connection:
            for site in sites:
                connection.execute(delete(SITES).where(SITES.c.name == site.name))
                connection.execute(insert(SITES).values(name=site.name, facts=asdict(site)))

    def sites(self) -> dict[str, Site]:
        """Every site that ever said hello, by name."""
        with self._begin() as connection:
            rows = connection.execute(select(SITES).order_by(SITES.c.name)).all()
        return {row.name: Site(**row.facts) for row in rows}

    def note(self, key: str, value: Any) -> None:
        """Remember a JSON value."""
        with self._begin() as connection:
            connection.execute(delete(NOTES).where(NOTES.c.key == key))
            connection.execute(insert(NOTES).values(key=key, value=value))

    def notes(self) -> Mapping[str, Any]:
        """All remembered values."""
        with self._begin() as connection:
            return {row.key: row.value for row in connection.execute(select(NOTES)).all()}

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as fault:
            first = str(fault).splitlines()[0]
            raise StorageError(f"journal {self._engine.url!r}: {first}; check space and permissions; nothing committed is lost") from None


def _round(row: Any) -> Round:
    return Round(row.number, row.attempt, row.step, {name: TaskRound.from_json(task) for name, task in row.tasks.items()})
