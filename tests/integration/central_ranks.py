"""One rank of several central jobs in one process, for `test_central.py`: ``python central_ranks.py FOLDER`` with RANK and WORLD_SIZE.

Ranks of a world of one and of a world of two run this at the same time; each leaves a half-done job for the other to go on with.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from fedpeft.central.job import run
from fedpeft.central.world import World, joined
from fedpeft.errors import FedpeftError
from fedpeft.training.config import load_central


class Stopped(Exception):
    """A job that is left half done."""


def play(folder: Path, world: World, name: str, stop: int | None = None, **changes: str) -> dict[str, object]:
    """The losses of each step of one job, or the fault that ended it."""
    losses: list[dict[str, float]] = []

    def heard(step: int, loss: float, by_task: object) -> None:
        if stop is not None and step > stop:
            raise Stopped
        losses.append({"all": loss, **by_task})  # type: ignore[dict-item]

    table = {key.replace("__", "."): value for key, value in changes.items()} | {"output": str(folder / name)}
    began = time.perf_counter()
    try:
        run(load_central(folder / "job.toml", table), world, progress=heard)
    except Stopped:
        pass
    except FedpeftError as fault:
        return {"fault": str(fault), "code": fault.exit_code, "seconds": time.perf_counter() - began}
    return {"losses": losses}


def waited(path: Path, seconds: float = 120.0) -> None:
    """Until ``path`` is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.1)


def half(folder: Path, world: World, **changes: str) -> None:
    """Leave a job after two of its steps, and say so."""
    play(folder, world, f"half{world.size}", stop=2, training__save_every="1", **changes)
    (folder / f"half{world.size}" / "left").touch()


def one(folder: Path, world: World) -> dict[str, object]:
    """A world of one."""
    found: dict[str, object] = {"stage0": play(folder, world, "one0", deepspeed__stage="0")}
    half(folder, world, deepspeed__stage="1")
    found |= {f"stage{stage}": play(folder, world, f"one{stage}", deepspeed__stage=stage) for stage in "123"}
    found["padded"] = play(folder, world, "padded1", deepspeed__stage="0", training__packing="false")
    found["shared"] = play(folder, world, "shared1", shared="true", deepspeed__stage="0")
    found["single"] = play(folder, world, "single1", deepspeed__stage="2", **json.loads((folder / "single.json").read_text()))
    found["diverged"] = play(folder, world, "diverged1", deepspeed__stage="0", training__lr="1e38", training__clip="0.0")
    waited(folder / "half2" / "left")
    found["resumed"] = play(folder, world, "half2", deepspeed__stage="0", training__save_every="1")
    return found


def two(folder: Path, world: World) -> dict[str, object]:
    """A world of two."""
    half(folder, world, deepspeed__stage="3")
    found: dict[str, object] = {f"stage{stage}": play(folder, world, f"two{stage}", deepspeed__stage=stage) for stage in "0123"}
    found["padded"] = play(folder, world, "padded2", deepspeed__stage="2", training__packing="false")
    found["shared"] = play(folder, world, "shared2", shared="true", deepspeed__stage="3")
    for stage in "23":
        found[f"nf4.{stage}"] = play(folder, world, f"nf4-{stage}", deepspeed__stage=stage, base__quantization="nf4")
    missing = {"tasks__animals__data__path": "nowhere.jsonl"} if world.rank else {}
    found["missing"] = play(folder, world, "missing2", deepspeed__stage="2", **missing)
    other = {"tasks__animals__data__path": "colours.jsonl"} if world.rank else {}
    found["other"] = play(folder, world, "other2", deepspeed__stage="2", **other)
    waited(folder / "half1" / "left")
    found["resumed"] = play(folder, world, "half1", deepspeed__stage="2", training__save_every="1")
    return found


def main() -> None:
    """Entry point."""
    folder, world = Path(sys.argv[1]), World.of(os.environ)
    assert world is not None
    os.chdir(folder)
    with joined(world, 60):
        found = (one if world.size == 1 else two)(folder, world)
    (folder / f"found{world.size}.{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
