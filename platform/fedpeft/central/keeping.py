"""Which checkpoints stay: the latest few and the best one, beside the last, from which the job goes on.

Each is the file that the loop wrote, under one more name, so keeping costs no write and a kept file is as whole as the loop's. The record
of what is kept, and with which scores, is replaced atomically.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.central.progress import Scores
from fedpeft.errors import DataError, StorageError
from fedpeft.files import sync_folder, write_atomic
from fedpeft.tasks.metrics import upward
from fedpeft.training import checkpoint
from fedpeft.training.checkpoint import FILE

if TYPE_CHECKING:
    from fedpeft.training.config import CentralConfig

RECORD = "kept.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """A checkpoint that stays: after how many steps, and the scores of that moment by task (empty: none were taken)."""

    step: int
    scores: Scores

    @property
    def file(self) -> str:
        """Its name in the folder."""
        return f"step-{self.step:08}.safetensors"


@dataclass(frozen=True)
class Keeper:
    """Keeps under ``folder`` the ``keep`` latest checkpoints and the one that is ``best`` by the tasks' first metrics (``headlines``)."""

    folder: Path
    keep: int
    best: str | None
    headlines: Mapping[str, str]

    @staticmethod
    def of(config: CentralConfig) -> Keeper:
        """What the job asks for."""
        headlines = {name: entry.task.headline for name, entry in config.tasks.items()}
        return Keeper(config.state, config.checkpoints.keep, config.checkpoints.best, headlines)

    def require(self, tested: Collection[str]) -> None:
        """Raise `DataError` unless the ``tested`` tasks, those with test rows, can tell the best."""
        missing = sorted(set(self._judges) - set(tested))
        if missing:
            raise DataError(f"checkpoints.best = {self.best!r}: tasks {missing} have no test rows; give them some, or name another task")

    def save(self, job: str, step: int, scores: Scores) -> None:
        """The loop wrote a checkpoint of ``job`` after ``step`` steps: keep it, and drop what is too old.

        Raises:
            StorageError: no space or permission; what was kept stays.
        """
        earlier = [kept for kept in self.kept(job) if kept.step < step]
        found = [*earlier, Kept(step, scores)]
        wanted = found[-self.keep :]
        if (best := self._best(found)) is not None and best not in wanted:
            wanted = [best, *wanted]
        self._link(found[-1].file)
        record = {"job": job, "kept": [{"step": kept.step, "scores": kept.scores} for kept in wanted]}
        write_atomic(self.folder / RECORD, json.dumps(record).encode())
        names = {kept.file for kept in wanted}
        for path in self.folder.glob("step-*.safetensors"):
            if path.name not in names:
                path.unlink(missing_ok=True)

    def kept(self, job: str | None = None) -> list[Kept]:
        """What is kept of ``job`` (None: of whichever it is), oldest first."""
        try:
            record: Any = json.loads((self.folder / RECORD).read_bytes())
            found = [Kept(int(kept["step"]), kept["scores"]) for kept in record["kept"]] if job in (None, record["job"]) else []
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as fault:
            log.warning("%s: cannot be read (%s), ignored; no earlier checkpoint counts", self.folder / RECORD, fault)
            return []
        return [kept for kept in found if (self.folder / kept.file).is_file()]

    def chosen(self) -> Kept | None:
        """The best checkpoint, where the job asks for it and there is one."""
        return self._best(self.kept())

    def repair(self) -> None:
        """Where the last checkpoint is torn or gone, the newest kept one that is whole takes its place. Raises `StorageError`."""
        if checkpoint.read(self.folder) is not None:
            return
        for kept in reversed(self.kept()):
            if checkpoint.read(self.folder, kept.file) is not None:
                log.warning("%s: torn or gone; the job goes on from step %d", self.folder / FILE, kept.step)
                write_atomic(self.folder / FILE, (self.folder / kept.file).read_bytes())
                return

    def _best(self, found: list[Kept]) -> Kept | None:
        scored = [(self._merit(kept.scores), kept) for kept in found if self._judges and all(map(kept.scores.get, self._judges))]
        return max(scored, key=lambda pair: (pair[0], -pair[1].step))[1] if scored else None

    def _merit(self, scores: Scores) -> float:
        """More is better; what is not a number is worst."""
        values = [upward(self.headlines[name], scores[name][self.headlines[name]]) for name in self._judges]
        merit = min(values) if self.best == "worst" else sum(values) / len(values)
        return -inf if isnan(sum(values)) else merit

    @property
    def _judges(self) -> list[str]:
        """Tasks whose scores decide."""
        if self.best is None:
            return []
        return list(self.headlines) if self.best in ("mean", "worst") else [self.best]

    def _link(self, name: str) -> None:
        """The last checkpoint under ``name`` too; a copy where the file system has no links."""
        last, place, beside = self.folder / FILE, self.folder / name, self.folder / f".new-{name}"
        try:
            if place.exists() and place.samefile(last):
                return
            beside.unlink(missing_ok=True)
            os.link(last, beside)
            beside.replace(place)
            sync_folder(self.folder)
        except FileNotFoundError:
            raise StorageError(f"{last}: is gone; does another job write to the same output?") from None
        except OSError:
            write_atomic(place, last.read_bytes())
