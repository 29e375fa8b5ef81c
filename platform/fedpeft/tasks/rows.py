"""Rows from files, a hub data set or the embedded data: read, renamed, filtered, split, limited; at once, or row by row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fedpeft.config import Section
from fedpeft.errors import DataError
from fedpeft.tasks.hub import hub_rows
from fedpeft.tasks.images import placed, rows_of_folder
from fedpeft.tasks.protocol import Row
from fedpeft.tasks.split import ALIASES, lowest, row_key, split_of
from fedpeft.tasks.spreadsheets import read_csv


class Source(Section):
    """Where rows come from: exactly one of ``path`` (a file, a folder of files, or a folder of images by label), ``hub`` and ``package``.

    ``columns`` renames (the file's name on the left, ours on the right); ``where`` keeps rows whose column has one of the
    values; ``limit`` keeps so many rows, chosen by hash and so spread over the file; ``config`` is the hub data set's configuration.
    """

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    package: Literal["stdlib"] | None = None
    where: dict[str, str | list[str]] = Field(default={})
    limit: int | None = Field(default=None, ge=1)
    columns: dict[str, str] = Field(default={})

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        given = [key for key in ("path", "hub", "package") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, hub and package; {given or 'none'} given")
        return self

    def rooted(self, folder: Path) -> Source:
        """With its ``path``, where that is relative, under ``folder``."""
        return self if self.path is None else self.model_copy(update={"path": str(folder / Path(self.path).expanduser())})

    @property
    def label(self) -> str:
        """What messages call this source."""
        return str(self.path or self.hub or self.package)


def read_rows(source: Source, split: str | None = None) -> list[Row]:
    """All rows of ``source``, or those of one split (``train`` or ``test``).

    A ``split`` column decides where there is one (``val`` stands in where no ``test`` is); else a fifth of the rows, by hash,
    is the test split.

    Raises:
        DataError: a missing, unreadable or empty file, a wrong column, or no row left by ``where`` and ``split``.
    """
    return list(_placed(_kept(_load(source), source, split, lambda make: list(make())), source))


def stream_rows(source: Source, split: str | None = None) -> Iterator[Row]:
    """The rows that `read_rows` gives, in its order, from .jsonl files of any size; they are read a few times over.

    Raises:
        DataError: as `read_rows`; also a source that is no .jsonl file or folder of them.
    """
    files = files_of(source)
    other = [path for path in files if READERS.get(path.suffix.lower()) is not _read_lines]
    if other:
        raise DataError(f"{other[0]}: cannot be streamed; give .jsonl files, one object a line, or read it at once (stream = false)")
    yield from _placed(_kept(Again(lambda: (row for path in files for row in _guarded(path, _lines))), source, split, Again), source)


def files_of(source: Source) -> list[Path]:
    """The files of ``source``, those of a folder by name. Raises `DataError` when it names no file or folder, or an empty one."""
    if source.path is None:
        raise DataError(f"{source.label}: no file or folder; give path")
    path = Path(source.path).expanduser()
    if not path.is_dir():
        return [path]
    found = _inside(path)
    if not found:
        raise DataError(f"{path}: holds no file of rows; its names must end in one of {sorted(READERS)}")
    return found


def _inside(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in READERS and file.name[0] not in "._")


@dataclass(frozen=True)
class Again:
    """Rows that are made anew whenever they are asked for, so that none stays in memory."""

    make: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.make()


Hold = Callable[[Callable[[], Iterator[Row]]], Iterable[Row]]
"""Keeps rows that will be gone through a few times: all of them (a list), or how they are made (`Again`)."""


def _kept(rows: Iterable[Row], source: Source, split: str | None, hold: Hold) -> Iterable[Row]:
    if not _any(rows):
        raise DataError(f"{source.label}: no rows; the data is empty")
    return _limited(_of_split(_matching(_renamed(rows, source, hold), source, hold), source, split, hold), source.limit, hold)


def _any(rows: Iterable[Row]) -> bool:
    return next(iter(rows), None) is not None


def _load(source: Source) -> list[Row]:
    if source.package:
        from fedpeft.tasks.stdlib import stdlib_rows

        return stdlib_rows()
    if source.hub:
        return hub_rows(source.hub, source.config)
    folder = Path(str(source.path)).expanduser()
    if folder.is_dir() and not _inside(folder):
        return list(_guarded(folder, _images))
    return [row for path in files_of(source) for row in _read_file(path)]


def _images(folder: Path) -> Iterator[Row]:
    """Rows of a folder of images. Raises `DataError` when it holds none."""
    found = rows_of_folder(folder, ALIASES)
    first = next(found, None)
    if first is None:
        raise DataError(
            f"{folder}: holds no file of rows; its names must end in one of {sorted(READERS)}; nor images by label, as in LABEL/*.png"
        )
    yield from chain([first], found)


def _placed(rows: Iterable[Row], source: Source) -> Iterable[Row]:
    """Paths of images are as seen from the file that names them; what was hashed so far is what stands there."""
    if source.path is None:
        return rows
    path = Path(source.path).expanduser()
    return placed(rows, path if path.is_dir() else path.parent)


def _read_file(path: Path) -> list[Row]:
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; give one of {sorted(READERS)}")
    return list(_guarded(path, READERS[path.suffix.lower()]))


def _guarded(path: Path, read: Callable[[Path], Iterable[Row]]) -> Iterator[Row]:
    """Rows of one file. Raises `DataError` when it is missing or cannot be read."""
    try:
        yield from read(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of a {', '.join(sorted(READERS))} file") from None
    except UnicodeDecodeError as fault:
        raise DataError(f"{path}: not UTF-8 at byte {fault.start}; save the file as UTF-8") from None
    except OSError as fault:
        raise DataError(f"{path}: cannot be read: {fault.strerror or fault}") from None


def _lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        before = 0
        for number, raw in enumerate(lines, 1):
            line = _decoded(raw, before)
            before += len(raw)
            if line.strip():
                yield _object(_parse(line, f"{path}, line {number}"), f"{path}, line {number}")


def _decoded(raw: bytes, before: int) -> str:
    """Text of a line that begins at byte ``before`` of its file."""
    try:
        return raw.decode("utf-8" if before else "utf-8-sig")
    except UnicodeDecodeError as fault:
        raise UnicodeDecodeError("utf-8", fault.object, before + fault.start, before + fault.end, fault.reason) from None


def _read_lines(path: Path) -> list[Row]:
    return list(_lines(path))


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    table = _parse(text, str(path))
    lists = [value for value in table.values() if isinstance(value, list)] if isinstance(table, dict) else [table]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise DataError(
            f"{path}: expected a list of objects, or an object that holds one such list; name the file .jsonl if it has one object a line"
        )
    return [_object(row, f"{path}, item {number}") for number, row in enumerate(lists[0], 1)]


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path, partitioning=None).to_pylist()
    except pyarrow.ArrowInvalid as fault:
        raise DataError(f"{path}: not a Parquet file: {str(fault).splitlines()[0]}") from None
    return rows


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": _read_parquet,
}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as fault:
        raise DataError(f"{where}: not valid JSON at character {fault.colno} of line {fault.lineno}: {fault.msg}") from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{where}: a {type(value).__name__}, expected an object such as {{"text": ..., "label": ...}}')
    return value


def _renamed(rows: Iterable[Row], source: Source, hold: Hold) -> Iterable[Row]:
    if not source.columns:
        return rows
    _known_columns(rows, source.columns, f"{source.label}: columns")
    return hold(lambda: ({source.columns.get(key, key): value for key, value in row.items()} for row in rows))


def _matching(rows: Iterable[Row], source: Source, hold: Hold) -> Iterable[Row]:
    if not source.where:
        return rows
    _known_columns(rows, source.where, f"{source.label}: where")
    wanted = {key: {value} if isinstance(value, str) else set(value) for key, value in source.where.items()}
    kept = hold(lambda: (row for row in rows if all(str(row.get(key)) in values for key, values in wanted.items())))
    if not _any(kept):
        seen = {key: sorted({str(row.get(key)) for row in rows})[:12] for key in wanted}
        raise DataError(f"{source.label}: no row matches where = {source.where}; values seen are {seen}")
    return kept


def _known_columns(rows: Iterable[Row], names: Iterable[str], what: str) -> None:
    seen = {key for row in rows for key in row}
    unknown = sorted(set(names) - seen)
    if unknown:
        raise DataError(f"{what} names {unknown}, which no row has; columns seen are {sorted(seen)}")


def _of_split(rows: Iterable[Row], source: Source, split: str | None, hold: Hold) -> Iterable[Row]:
    if split is None:
        return rows
    if split not in ALIASES:
        raise DataError(f"{source.label}: unknown split {split!r}; ask for one of {sorted(ALIASES)}")
    if not any("split" in row for row in rows):
        kept = hold(lambda: (row for row in rows if split_of(row_key(row)) == split))
    else:
        seen = {str(row.get("split")) for row in rows}
        name = next((alias for alias in ALIASES[split] if alias in seen), split)
        kept = hold(lambda: (row for row in rows if row.get("split") == name))
    if not _any(kept):
        raise DataError(f"{source.label}: no row in split {split!r} among {sum(1 for _ in rows)}; {_splits_seen(rows)}")
    return kept


def _splits_seen(rows: Iterable[Row]) -> str:
    seen = sorted({str(row.get("split")) for row in rows})
    return f"splits seen are {seen}" if any("split" in row for row in rows) else "add rows, or a split column"


def _limited(rows: Iterable[Row], limit: int | None, hold: Hold) -> Iterable[Row]:
    """``limit`` rows, the same on every machine and spread over the file, in the file's order."""
    if limit is None:
        return rows
    chosen = frozenset(lowest(rows, limit))
    return hold(lambda: (row for number, row in enumerate(rows) if number in chosen))
