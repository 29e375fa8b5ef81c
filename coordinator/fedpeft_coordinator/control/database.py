"""Histories in a database: SQLite, Postgres or any other SQLAlchemy URL; the place in its list is a line's key, so appending is a swap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import (
    Column,
    Connection,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    event,
    func,
    insert,
    literal,
    select,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

from fedpeft.errors import StorageError
from fedpeft_coordinator.sql import open_engine

SCHEMA = MetaData()
LINES = Table(
    "fedpeft_lines",
    SCHEMA,
    Column("name", String(160), primary_key=True),
    Column("place", Integer, primary_key=True, autoincrement=False),
    Column("line", LargeBinary, nullable=False),
)
COUNTED = {"preserve_rowcount": True}


class SqlHistories:
    """Lists of lines at the SQLAlchemy ``url``, made where they are absent. Raises `StorageError` when it cannot be opened."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url, "registry database", "postgresql+psycopg://host/name", pool_pre_ping=True)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _durable)
        with suppress(IntegrityError), self._begin() as connection:
            connection.execute(CreateTable(LINES, if_not_exists=True))

    def where(self, name: str) -> str:
        """The database, without its password, and the list."""
        return f"{self._engine.url!r}/{name}"

    def lines(self, name: str) -> list[bytes]:
        """One query."""
        with self._begin() as connection:
            rows = connection.execute(select(LINES.c.line).where(LINES.c.name == name).order_by(LINES.c.place)).all()
        return [bytes(row.line) for row in rows]

    def append(self, name: str, count: int, line: bytes) -> bool:
        """One statement: the key (name, place) can be taken once, and a place that would leave a gap is not taken."""
        here = select(func.count()).select_from(LINES).where(LINES.c.name == name).scalar_subquery()
        row = select(literal(name), literal(count), literal(line, LargeBinary)).where(here == count)
        try:
            with self._begin() as connection:
                told = connection.execute(insert(LINES).from_select(["name", "place", "line"], row), execution_options=COUNTED)
                return told.rowcount == 1
        except IntegrityError:
            return False

    def names(self) -> tuple[str, ...]:
        """One query."""
        with self._begin() as connection:
            return tuple(row.name for row in connection.execute(select(LINES.c.name).distinct().order_by(LINES.c.name)).all())

    def stamp(self) -> object:
        """How many lines there are: none is ever removed."""
        with self._begin() as connection:
            return connection.execute(select(func.count()).select_from(LINES)).scalar_one()

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except SQLAlchemyError as fault:
            first = str(fault).splitlines()[0]
            raise StorageError(f"registry {self._engine.url!r}: {first}; check space, rights and network; nothing is lost") from None


def _durable(connection: object, _record: object) -> None:
    """A commit is on the disk, and writers wait for each other."""
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("busy_timeout = 10000", "journal_mode = wal", "synchronous = full"):
        cursor.execute(f"pragma {pragma}")
    cursor.close()
