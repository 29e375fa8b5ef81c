"""All that a control plane's process needs, in one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fedpeft import config
from fedpeft.errors import ConfigError
from fedpeft_coordinator.control.config import Control
from fedpeft_coordinator.status import Watched


@dataclass(frozen=True)
class Settings:
    """``registry`` is its folder (keys stay there), ``state`` holds broken pushes and the log of calls."""

    control: Control
    registry: Path
    state: Path
    federation: Watched | None = None

    def save(self, path: Path) -> None:
        """Write as JSON; a database's password may be in it."""
        watched = None if self.federation is None else asdict(self.federation)
        table = {"control": self.control.model_dump(mode="json"), "registry": self.registry, "state": self.state, "federation": watched}
        path.touch(0o600)
        path.write_text(json.dumps(table, default=str), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Settings:
        """Inverse of `save`."""
        table = json.loads(path.read_text(encoding="utf-8"))
        watched = table["federation"]
        if watched is not None:
            paths = {key: Path(watched[key]) for key in ("state", "registry_folder")}
            watched = Watched(**{**watched, **paths, "tasks": tuple(watched["tasks"])})
        return Settings(Control(**table["control"]), Path(table["registry"]), Path(table["state"]), watched)


def standalone(registry: Path, file: Path | None, overrides: Mapping[str, str]) -> Settings:
    """For a registry without a federation; ``file`` is TOML with the keys of ``[control]``.

    Raises:
        ConfigError: the file is missing or has faults (all are named), or a certificate file does not exist.
    """
    control = config.load(file, Control, overrides) if file else config.with_overrides(Control, overrides, "control")
    folder = file.resolve().parent if file else Path.cwd()
    control = control.rooted(folder, f"{file or '--set'}: control")
    if not registry.is_dir() and control.store is None:
        raise ConfigError(f"{registry}: no such folder; make it for a new registry, or name the one that a federation published to")
    return Settings(control, registry.resolve(), (registry / "control").resolve())
