"""Where the curves of a job are drawn: each tracker's package is an optional extra, imported when a job asks for it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fedpeft.errors import ConfigError


class Log(Protocol):
    """One run that is being drawn."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Note ``values`` by name at ``step``."""

    def close(self) -> None:
        """Bring what was noted to disk."""


class Tracker(Protocol):
    """A kind of place for curves."""

    kind: ClassVar[str]

    def check(self) -> None:
        """Raise `ConfigError` when its package is not installed."""

    def open(self, name: str, output: Path, settings: Mapping[str, Any], first: int) -> Log:
        """Begin, or go on with, the run ``name`` at step ``first``."""


@dataclass(frozen=True)
class TensorBoard:
    """Event files under ``folder`` (default: ``tensorboard`` in the job's output), for ``tensorboard --logdir``.

    Steps that a resumed job does again replace what an earlier try noted of them.
    """

    folder: str = "tensorboard"
    kind: ClassVar[str] = "tensorboard"

    def check(self) -> None:
        """See `Tracker.check`."""
        _require("tensorboard")

    def open(self, name: str, output: Path, settings: Mapping[str, Any], first: int) -> Log:
        """See `Tracker.open`."""
        self.check()
        from torch.utils.tensorboard import SummaryWriter

        return _EventFiles(SummaryWriter(str(output / Path(self.folder).expanduser()), purge_step=first))


@dataclass(frozen=True)
class Trackio:
    """A local trackio project, for ``trackio show``; nothing leaves the machine. ``folder`` is where it lies (default: trackio's own)."""

    project: str = "fedpeft"
    folder: str | None = None
    kind: ClassVar[str] = "trackio"

    def check(self) -> None:
        """See `Tracker.check`."""
        _require("trackio")

    def open(self, name: str, output: Path, settings: Mapping[str, Any], first: int) -> Log:
        """See `Tracker.open`."""
        if self.folder is not None:
            os.environ["TRACKIO_DIR"] = str(output / Path(self.folder).expanduser())  # read when the package is imported
        self.check()
        import trackio

        return _Project(trackio.init(self.project, name, config=dict(settings), resume="allow", embed=False))


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio}


@dataclass(frozen=True)
class _EventFiles:
    writer: Any

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


@dataclass(frozen=True)
class _Project:
    run: Any

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step)

    def close(self) -> None:
        self.run.finish()


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"track: {package} is not installed; run pip install 'fedpeft[{package}]', or leave out [track]")
