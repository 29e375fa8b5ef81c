"""A task's examples on disk, for data larger than memory: rows are read and tokenised once, some at a time, and mapped from then on.

Under ``FOLDER/TASK-FINGERPRINT/PART`` lie flat arrays: ``ids`` int32 (all sequences one after the other), ``ends`` (S,), ``labels`` (N,),
``starts`` (S,) and ``owners`` (S,) int64, ``texts`` (UTF-8 of what is expected, one after the other) and ``cuts`` int64, little-endian; and
``index.json``, written last. The parts are ``train``, and ``held`` where rows are held out of training. The fingerprint covers the files'
names, sizes and times, the source, the task, the tokenizer, the cap and how many are held out, so nothing stale is read; the folder
appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from fedpeft.central.held import held_out
from fedpeft.config import describe
from fedpeft.errors import ConfigError, DataError, StorageError
from fedpeft.files import sync_folder, write_synced
from fedpeft.tasks.encoding import token_limit
from fedpeft.tasks.protocol import Encoded, Ids
from fedpeft.tasks.rows import Again, files_of, stream_rows

if TYPE_CHECKING:
    from fedpeft.bases import Base
    from fedpeft.tasks import Row, Source, Task

FORM = 2
"""Of the files; another one is another fingerprint."""
CHUNK = 512
"""Rows that are in memory at once while they are tokenised."""
INDEX = "index.json"
TYPES = {"ids": "<i4", "ends": "<i8", "labels": "<i8", "starts": "<i8", "owners": "<i8", "texts": "u1", "cuts": "<i8"}
TRAIN, HELD = "train", "held"


@dataclass(frozen=True, eq=False)
class Sequences(Sequence[Ids]):
    """Sequences that lie one after the other in ``flat``; each is copied out when it is asked for."""

    flat: NDArray[Any]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return tuple(self[number] for number in range(*place.indices(len(self))))
        end = int(self.ends[place])
        return np.array(self.flat[int(self.ends[place - 1]) if place % len(self) else 0 : end])


@dataclass(frozen=True, eq=False)
class Stored(Encoded):
    """Examples whose arrays are mapped files; ``digest`` is SHA-256 over what they hold."""

    digest: str = ""


def stored(folder: Path, task: Task, source: Source, base: Base, cap: int | None = None, held: int = 0) -> tuple[Stored, Stored | None]:
    """The train examples of ``task``, of the first ``cap`` rows of ``source``, and those of the rows among them that are ``held`` out.

    At most so many rows are held out, by `held_out`; none where it is 0. What ``folder`` holds already is opened.

    Raises:
        DataError: rows are missing, unreadable, of an unknown form or too few, or the source is no .jsonl file or folder of them.
        StorageError: no space or permission; nothing is left behind.
        ConfigError: the base reads images, which are read from their files anyway.
    """
    if base.processor is not None:
        raise ConfigError(
            f"tasks.{task.name}.stream: only texts are laid out on disk, and base {base.spec.model} reads images; leave stream out"
        )
    place, names = folder / f"{task.name}-{fingerprint(task, source, base, cap, held)[:24]}", (TRAIN, HELD)[: 1 + bool(held)]
    found = _opened(place, names)
    if found is None:
        _build(place, task, _parts(task, Again(lambda: islice(stream_rows(source, "train"), cap)), held), base)
        found = _opened(place, names)
    if found is None:
        raise StorageError(f"{place}: was torn right after it was written; look at the disk, remove the folder, run it again")
    for older in folder.glob(f"{task.name}-{'[0-9a-f]' * 24}"):
        if older != place:
            shutil.rmtree(older, ignore_errors=True)
    return found[0], found[1] if held else None


def fingerprint(task: Task, source: Source, base: Base, cap: int | None, held: int) -> str:
    """SHA-256 over all that decides what the examples are. Raises `DataError` when a file is missing."""
    try:
        files = [(str(path), stat.st_size, stat.st_mtime_ns) for path in files_of(source) for stat in (path.stat(),)]
    except OSError as fault:
        raise DataError(f"{fault.filename}: cannot be read: {fault.strerror}; give a .jsonl file or a folder of them") from None
    described = {"task": describe(task), "source": source.model_dump(mode="json"), "tokenizer": base.fingerprint.tokenizer}
    table = described | {"form": FORM, "files": files, "cap": cap, "held": held}
    table |= {"tokens": token_limit(base), "pad": base.tokenizer.pad_token_id, "family": base.family}
    return hashlib.sha256(json.dumps(table, sort_keys=True, default=str).encode()).hexdigest()


def _parts(task: Task, rows: Iterable[Row], held: int) -> dict[str, Iterator[Row]]:
    """``rows``, which are gone through a few times, by part."""
    if not held:
        return {TRAIN: iter(rows)}
    apart = held_out(task.name, rows, held)
    return {
        TRAIN: (row for number, row in enumerate(rows) if number not in apart),
        HELD: (row for number, row in enumerate(rows) if number in apart),
    }


def _build(place: Path, task: Task, parts: Mapping[str, Iterator[Row]], base: Base) -> None:
    """Tokenise ``parts`` into a folder beside ``place``, then give it its name; another process may have been faster."""
    beside: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=place.parent, prefix=".new-"))
        for name, rows in parts.items():
            (beside / name).mkdir()
            _write(beside / name, task, rows, base)
            sync_folder(beside / name)
        if _opened(place, tuple(parts)) is None:
            shutil.rmtree(place, ignore_errors=True)
            with suppress(FileExistsError):
                beside.rename(place)
        sync_folder(place.parent)
    except OSError as fault:
        raise StorageError(f"{place}: cannot be written: {fault.strerror or fault}; free space or choose another output") from None
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _write(folder: Path, task: Task, rows: Iterator[Row], base: Base) -> None:
    hasher, counts, pad, first = hashlib.sha256(), dict.fromkeys(TYPES, 0), 0, 1
    paired = False
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in TYPES}
        while chunk := list(islice(rows, CHUNK)):
            data = _encoded(task, chunk, first, base)
            texts = data.references if folder.name == HELD else ()
            for name, values in (_arrays(data, counts, task.head.kind == "lm") | _texts(texts, counts["texts"])).items():
                counts[name] += len(values)
                hasher.update(f"{name} {len(values)}\n".encode() + values.tobytes())
                _append(files[name], values)
            pad, paired, first = data.pad, data.paired, first + len(chunk)
        for file in files.values():
            write_synced(file.fileno(), b"")
    record = {"counts": counts, "pad": pad, "paired": paired, "digest": hasher.hexdigest()}
    with (folder / INDEX).open("wb") as index:
        write_synced(index.fileno(), json.dumps(record).encode())


def _append(file: BinaryIO, values: NDArray[Any]) -> None:
    file.write(values.tobytes())
    file.flush()


def _encoded(task: Task, rows: Sequence[Row], first: int, base: Base) -> Encoded:
    try:
        return task.encode(rows, base)
    except DataError as fault:
        raise DataError(f"{fault} (counted from row {first} of those read)" if first > 1 else str(fault)) from None


def _arrays(data: Encoded, before: dict[str, int], generative: bool) -> dict[str, NDArray[Any]]:
    """What is appended for ``data``, after so many values as ``before`` says."""
    ids = np.concatenate([np.zeros(0, np.int32), *data.ids])
    ends = np.cumsum([len(sequence) for sequence in data.ids]) + before["ids"]
    labels = data.labels + (before["ends"] if generative else 0)
    arrays = {"ids": ids, "ends": ends, "labels": labels, "starts": data.starts, "owners": data.owners + before["labels"]}
    return {name: np.asarray(values, TYPES[name]) for name, values in arrays.items()}


def _texts(texts: Sequence[str], before: int) -> dict[str, NDArray[Any]]:
    coded = [text.encode() for text in texts]
    cuts = np.cumsum([len(text) for text in coded], dtype=TYPES["cuts"]) + before
    return {"texts": np.frombuffer(b"".join(coded), TYPES["texts"]), "cuts": cuts}


def _opened(place: Path, names: Sequence[str]) -> list[Stored] | None:
    """The parts that lie in ``place``; None when one is absent or not whole."""
    found = [_part(place / name) for name in names]
    return None if None in found else cast("list[Stored]", found)


def _part(folder: Path) -> Stored | None:
    try:
        record: Any = json.loads((folder / INDEX).read_bytes())
        counts = record["counts"]
        whole = all((folder / name).stat().st_size == counts[name] * np.dtype(kind).itemsize for name, kind in TYPES.items())
        arrays = {name: _mapped(folder / name, kind, counts[name]) for name, kind in TYPES.items()} if whole else {}
        rest = (arrays["labels"], arrays["starts"], arrays["owners"])
        texts = tuple(text.tobytes().decode() for text in Sequences(arrays["texts"], arrays["cuts"]))
        return Stored(
            Sequences(arrays["ids"], arrays["ends"]), *rest, record["pad"], texts, paired=record["paired"], digest=record["digest"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mapped(path: Path, kind: str, count: int) -> NDArray[Any]:
    """An empty file cannot be mapped."""
    return np.memmap(path, kind, "r", shape=(count,)) if count else np.zeros(0, kind)
