"""The jobs of one rank and of two, played once for all tests here: ``found`` for those of `make test`, ``more`` for the slow ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.central.jobs import written

from fedpeft.processes import FLAG

SECONDS = 600
"""How long the ranks of a part may take on a loaded machine: the first costs 35 CPU seconds, the other 160."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory, shared_models) -> Path:
    return written(tmp_path_factory.mktemp("central"), shared_models)


def played(folder: Path, part: str) -> dict[str, dict]:
    """What the rank of a world of one and those of a world of two find: ``1.0``, ``2.0`` and ``2.1``."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("ranks.py")), str(folder), part]
    env = {**os.environ, FLAG: "1", "OMP_NUM_THREADS": "1"}
    with (
        (folder / f"{part}.log").open("wb") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env) as started,
    ):
        try:
            code = started.wait(SECONDS)
        finally:
            started.kill()
    assert code == 0, "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))
    return {path.stem.removeprefix(part): json.loads(path.read_text()) for path in folder.glob(f"{part}?.?.json")}


@pytest.fixture(scope="session")
def found(folder) -> dict[str, dict]:
    return played(folder, "first")


@pytest.fixture(scope="session")
def more(folder, found) -> dict[str, dict]:
    """All that was found, with what takes minutes."""
    return {world: found[world] | every for world, every in played(folder, "more").items()}
