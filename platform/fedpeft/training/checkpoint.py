"""The half-trained state of a job on disk: one safetensors file, replaced atomically, that vouches for itself.

The file holds the flat buffer and the engine's state; its header holds a JSON record and a SHA-256 over both. A file
that is torn, altered or of another job is not an error: the job starts at step 0 and ends at the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

from fedpeft.errors import StorageError
from fedpeft.files import write_atomic

FILE = "state.safetensors"
Arrays = Mapping[str, NDArray[Any]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tally:
    """How far a job is: optimizer steps done and the running sums of `TrainResult`."""

    step: int = 0
    loss_sum: float = 0.0
    count: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A job's digest, its tally, and the arrays that continue it."""

    job: str
    tally: Tally
    arrays: Arrays


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint in ``folder``, whole or not at all.

    Raises:
        StorageError: no space, no permission, or the folder is a file.
    """
    record = json.dumps({"job": checkpoint.job, "tally": asdict(checkpoint.tally)}, sort_keys=True)
    body = serialise(dict(checkpoint.arrays), {"record": record, "sha256": _digest(record, checkpoint.arrays)})
    write_atomic(folder / FILE, body)


def load(folder: Path, job: str) -> Checkpoint | None:
    """The checkpoint of ``job`` in ``folder``; None, with one logged line, when it is absent, torn or of another job."""
    path = folder / FILE
    try:
        body = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as fault:
        raise StorageError(f"{path}: cannot read the training checkpoint ({fault}); check permissions of the state folder") from None
    found = _parse(body)
    if found is None:
        log.warning("%s: torn or altered, ignored; the job starts at step 0", path)
    elif found.job != job:
        log.info("%s: belongs to another job (%s, this one is %s), ignored", path, found.job[:12], job[:12])
        return None
    return found


def read(folder: Path, file: str = FILE) -> Checkpoint | None:
    """The checkpoint in ``folder``, whatever its job; None when it is absent or torn. Raises `StorageError` when it cannot be read."""
    path = folder / file
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as fault:
        raise StorageError(f"{path}: cannot read the training checkpoint ({fault}); check permissions of the state folder") from None


def clear(folder: Path) -> None:
    """Remove the checkpoint and what an interrupted write left behind; the folder too when nothing else is in it."""
    if not folder.is_dir():
        return
    for path in (folder / FILE, *folder.glob(".new-*")):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _digest(record: str, arrays: Arrays) -> str:
    state = hashlib.sha256(record.encode())
    for name, array in sorted(arrays.items()):
        state.update(f"{name} {array.dtype.str} {array.shape}".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


def _parse(body: bytes) -> Checkpoint | None:
    """Read a file's bytes; None unless every byte is as it was written."""
    try:
        arrays, meta = parse(body), _metadata(body)
        record = json.loads(meta["record"])
        if _digest(meta["record"], arrays) != meta["sha256"]:
            return None
        return Checkpoint(record["job"], Tally(**record["tally"]), arrays)
    except (SafetensorError, KeyError, TypeError, ValueError, struct.error):
        return None


def _metadata(body: bytes) -> dict[str, str]:
    """The ``__metadata__`` table of a safetensors file: a little-endian length, then JSON."""
    (length,) = struct.unpack_from("<Q", body)
    meta: dict[str, str] = json.loads(body[8 : 8 + length])["__metadata__"]
    return meta
