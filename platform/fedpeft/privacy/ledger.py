"""What was spent: every noised release, written, signed and on disk before it leaves; totals from the accountant, across restarts.

One JSON line a release, each with the hash of the line before and a signature of its own. A line without its newline is one that a
dying process did not finish: nothing was released on it, and the next append cuts it off. A line that was finished counts, whether
or not its release followed: a ledger may count too much, never too little.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from fedpeft.errors import PrivacyError, StorageError
from fedpeft.files import sync_folder, write_synced
from fedpeft.privacy.accounting import Event, epsilon
from fedpeft.signing import Keys, verified

PURPOSE = "ledger v1"
NAME = "ledger.jsonl"
START = "0" * 64
Kind = Literal["adapter", "metrics", "centroid", "gate"]
Unit = Literal["site", "example"]
KINDS: tuple[str, ...] = get_args(Kind)
UNITS: tuple[str, ...] = get_args(Unit)


@dataclass(frozen=True)
class Budget:
    """The most ``epsilon`` at ``delta`` that may be spent."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Charge:
    """One release: ``id`` names it for ever (run/round/attempt/task/what), ``sites`` whom it cost: all who might have taken part.

    Whoever reads the ledger learns the ``sites``; under sampling they are all members, not the ones drawn. ``unit`` says what the
    event protects; budgets of different units are never added up.

    Raises:
        PrivacyError: a name is empty, or the kind or unit is not known.
    """

    id: str
    task: str
    kind: Kind
    event: Event
    sites: tuple[str, ...] = ()
    unit: Unit = "site"

    def __post_init__(self) -> None:
        if not (self.id and self.task) or self.kind not in KINDS or self.unit not in UNITS:
            raise PrivacyError(
                f"ledger: id={self.id!r}, task={self.task!r}, kind={self.kind!r}, unit={self.unit!r}; kinds are {KINDS}, units {UNITS}"
            )
        object.__setattr__(self, "sites", tuple(sorted(self.sites)))

    def to_json(self) -> dict[str, Any]:
        """A JSON form that `from_json` reads back."""
        return {**vars(self), "event": self.event.to_json(), "sites": list(self.sites)}

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> Charge:
        """Inverse of `to_json`. Raises `PrivacyError`, `KeyError` or `TypeError` on anything else."""
        return Charge(**{**table, "event": Event.from_json(table["event"]), "sites": tuple(table["sites"])})


@dataclass(frozen=True)
class Entry:
    """One line: the ``number``-th charge, when it was written (for people only), and the hash of the line before."""

    number: int
    charge: Charge
    created: str
    previous: str

    @cached_property
    def hash(self) -> str:
        """SHA-256 over everything in the line but the signature."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A JSON form, without hash and signature."""
        return {"number": self.number, "charge": self.charge.to_json(), "created": self.created, "previous": self.previous}


@dataclass(frozen=True)
class Ledger:
    """The ledger in ``folder``: ``ledger.jsonl``, and the key that signs it under ``keys/``."""

    folder: Path

    @property
    def path(self) -> Path:
        """The file of lines."""
        return self.folder / NAME

    @property
    def keys(self) -> Keys:
        """Who signs lines."""
        return Keys(self.folder / "keys", PURPOSE)

    def entries(self) -> tuple[Entry, ...]:
        """All finished lines, oldest first. Raises `StorageError` when one was changed, or is signed by a key that is not known here."""
        faults: list[str] = []
        found = tuple(_read(self.path, self.keys, faults))
        if faults:
            raise StorageError(faults[0])
        return found

    def verify(self, known: tuple[int, str] | None = None) -> list[str]:
        """What is wrong, one line each; nothing when numbers, hashes and signatures hold.

        A ledger that lost its last lines whole looks sound by itself: ``known`` is a head (see `head`) that was seen before and
        must still be there.
        """
        faults: list[str] = []
        found = list(_read(self.path, self.keys, faults))
        if known is not None and not faults and (len(found) < known[0] or (known[0] and found[known[0] - 1].hash != known[1])):
            faults.append(f"{self.path}: entry {known[0]} ({known[1][:12]}) was seen before and is gone; restore the file from a backup")
        return faults

    def head(self) -> tuple[int, str]:
        """Number and hash of the last entry: what others keep, so that nobody can take entries away unseen."""
        entries = self.entries()
        return (entries[-1].number, entries[-1].hash) if entries else (0, START)

    def spend(self, charge: Charge, budget: Budget, site: str | None = None) -> float:
        """Write ``charge`` and return the epsilon spent with it; release only after this returned.

        The same charge under the same id was written before: nothing is added. ``site``: the budget is of all tasks of that
        site together, else of the charge's task.

        Raises:
            PrivacyError: the budget would be exceeded (nothing is written), or the id was spent on something else.
            StorageError: the ledger is damaged or cannot be written.
        """
        with self._alone() as handle:
            entries = self.entries()
            if _written(entries, charge, self.path):
                return _total(entries, charge, budget.delta, site)
            after = _allowed(entries, charge, budget, site)
            self._append(handle, charge, entries)
        return after

    def require(self, charge: Charge, budget: Budget, site: str | None = None) -> float:
        """The epsilon that would be spent with ``charge``; nothing is written.

        Raises:
            PrivacyError: it is more than ``budget`` allows, or the id was spent on something else.
            StorageError: the ledger is damaged.
        """
        entries = self.entries()
        if _written(entries, charge, self.path):
            return _total(entries, charge, budget.delta, site)
        return _allowed(entries, charge, budget, site)

    def spent(self, delta: float, task: str | None = None, site: str | None = None, unit: Unit = "site") -> float:
        """The epsilon at ``delta`` of all releases so far, of one task, of one site, or of both."""
        return epsilon(_events(self.entries(), task, site, unit), delta)

    def _append(self, handle: int, charge: Charge, entries: Sequence[Entry]) -> None:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        entry = Entry(len(entries) + 1, charge, created, entries[-1].hash if entries else START)
        signature = json.loads(self.keys.sign(entry.hash.encode()))
        line = json.dumps({**entry.to_json(), "hash": entry.hash, "signature": signature}, sort_keys=True).encode() + b"\n"
        end = os.pread(handle, os.fstat(handle).st_size, 0).rfind(b"\n") + 1
        try:
            os.ftruncate(handle, end)
            os.lseek(handle, end, os.SEEK_SET)
            write_synced(handle, line)
        except OSError as fault:
            os.ftruncate(handle, end)
            raise StorageError(f"{self.path}: cannot be written: {fault.strerror}; nothing is released: free space") from None

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """The open file, locked against other writers. Raises `StorageError`."""
        try:
            fresh = not self.path.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as fault:
            raise StorageError(f"{self.path}: cannot be opened: {fault.strerror}; nothing is released: check permissions") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if fresh:
                sync_folder(self.folder)
                sync_folder(self.folder.parent)
            yield handle
        finally:
            os.close(handle)


def _read(path: Path, keys: Keys, faults: list[str]) -> Iterator[Entry]:
    """Finished lines up to the first that is wrong, which ``faults`` then names."""
    if not path.exists():
        return
    before, known, lines = START, keys.known(), path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        entry = _parsed(line, known)
        if isinstance(entry, str) or entry.previous != before or entry.number != number:
            said = entry if isinstance(entry, str) else "out of order"
            faults.append(f"{path}: line {number} is {said}; what was spent is not known: restore the file from a backup")
            return
        before = entry.hash
        yield entry


def _parsed(line: bytes, known: frozenset[str]) -> Entry | str:
    """The entry, or what is wrong with the line."""
    try:
        table = json.loads(line)
        mark, signature = table.pop("hash"), table.pop("signature")
        entry = Entry(**{**table, "charge": Charge.from_json(table["charge"])})
        if entry.hash != mark:
            return "changed"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, PrivacyError):
        return "torn or malformed"
    key = str(signature.get("key")) if isinstance(signature, dict) else ""
    if key not in known or not verified(mark.encode(), json.dumps(signature).encode(), key, PURPOSE):
        return "not signed by a key that is known here (keys/signing.pub, keys/trusted)"
    return entry


def _written(entries: Sequence[Entry], charge: Charge, path: Path) -> bool:
    """Whether ``charge`` is there already. Raises `PrivacyError` when its id was spent on something else."""
    same = [entry.charge for entry in entries if entry.charge.id == charge.id]
    if same and same[0] != charge:
        raise PrivacyError(f"{path}: {charge.id} was spent on another release; a release's id serves once: begin a new attempt")
    return bool(same)


def _allowed(entries: Sequence[Entry], charge: Charge, budget: Budget, site: str | None) -> float:
    """The epsilon with ``charge``. Raises `PrivacyError` where that is more than ``budget``."""
    after = _total([*entries, Entry(0, charge, "", "")], charge, budget.delta, site)
    if not after <= budget.epsilon:
        whose = f"site {site!r}" if site else f"task {charge.task!r}"
        before = _total(entries, charge, budget.delta, site)
        raise PrivacyError(
            f"privacy budget: {whose} has spent epsilon {before:.3f} of {budget.epsilon:g} at delta {budget.delta:g}, "
            f"release {charge.id} would make it {after:.3f}; the round is refused: end the task here, or agree on a larger budget"
        )
    return after


def _total(entries: Sequence[Entry], charge: Charge, delta: float, site: str | None) -> float:
    return epsilon(_events(entries, None if site else charge.task, site, charge.unit), delta)


def _events(entries: Sequence[Entry], task: str | None, site: str | None, unit: Unit) -> list[Event]:
    charges = [entry.charge for entry in entries]
    return [
        charge.event
        for charge in charges
        if charge.unit == unit and task in (None, charge.task) and (site is None or site in charge.sites or not charge.sites)
    ]
