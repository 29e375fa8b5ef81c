"""One way to open a database, for all that keeps rows in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from fedpeft.errors import StorageError


def open_engine(url: str, what: str, example: str, **settings: Any) -> Engine:
    """An engine for the SQLAlchemy ``url``; the folder of a SQLite file is made where it is absent.

    Raises:
        StorageError: it cannot be opened; the line says ``what``, the URL without its password, and gives an ``example``.
    """
    parsed: object = "at no URL"
    try:
        parsed = place = make_url(url)
        if place.get_backend_name() == "sqlite" and place.database:
            Path(place.database).parent.mkdir(parents=True, exist_ok=True)
        return create_engine(url, **settings)
    except (SQLAlchemyError, ImportError, OSError) as fault:
        raise StorageError(f"{what} {parsed}: cannot be opened: {fault}; give an SQLAlchemy URL such as {example}") from None
