"""A site's secure aggregation machines on disk: a file for each instance, of the present round of each run."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import PrivacyError, StorageError
from fedpeft.files import write_atomic
from fedpeft.privacy.secagg import Member
from fedpeft.wire.v1.federation_pb2 import RoundPlan, TaskPlan

RUNS = 8
INSTANCES = 256
"""Runs, and instances of a round, that stay on disk; a coordinator that asks for more loses its oldest."""


@dataclass(frozen=True)
class Members:
    """Machines under ``root``; those of a round are deleted, with their secrets, when a later round of the run begins."""

    root: Path

    def find(self, asked: RoundPlan, plan: TaskPlan) -> Member | None:
        """The machine of the instance that ``plan`` names, or None. Raises `PrivacyError` when its file is torn."""
        try:
            return Member.from_bytes(self._path(asked, plan.masking.name).read_bytes())
        except FileNotFoundError:
            return None
        except OSError as fault:
            raise StorageError(f"{self.root}: cannot be read: {fault.strerror}; check the permissions of the state folder") from None

    def get(self, asked: RoundPlan, plan: TaskPlan) -> Member:
        """As `find`. Raises `PrivacyError` when there is none."""
        member = self.find(asked, plan)
        if member is None:
            raise PrivacyError(f"secure aggregation of task {plan.task!r}: this site gave no keys for {plan.masking.name[:200]!r}")
        return member

    def put(self, asked: RoundPlan, member: Member) -> None:
        """Keep ``member``, readable by this user alone; drop what is over. Raises `StorageError`."""
        path = self._path(asked, member.instance.name)
        fresh = not path.exists()
        write_atomic(path, member.to_bytes(), 0o600)
        if fresh:
            self._prune(path.parent)

    def _path(self, asked: RoundPlan, name: str) -> Path:
        return self.root / _digest(asked.run) / f"{asked.round:09d}" / f"{_digest(name)}.json"

    def _prune(self, present: Path) -> None:
        for path in present.parent.iterdir():
            if path.name < present.name:
                shutil.rmtree(path, ignore_errors=True)
        for path in _oldest(present, INSTANCES):
            path.unlink(missing_ok=True)
        for path in _oldest(self.root, RUNS):
            shutil.rmtree(path, ignore_errors=True)


def _oldest(folder: Path, keep: int) -> list[Path]:
    """All but the ``keep`` youngest of what this module made in ``folder``."""
    made = [path for path in folder.iterdir() if len(path.name.removesuffix(".json")) == 32]
    return sorted(made, key=lambda path: path.stat().st_mtime_ns)[:-keep]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
