"""One central job played by one rank: its losses and scores, what the rank held, or the fault that ended it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

from fedpeft.central.engine import ZeroEngine, ZeroRun
from fedpeft.central.job import run
from fedpeft.central.progress import Report, Scores
from fedpeft.central.world import World
from fedpeft.errors import FedpeftError
from fedpeft.mixtures import choice
from fedpeft.training.config import load_central

RUNS: list[ZeroRun] = []
"""The run of the job under way."""
begin = ZeroEngine.begin


def noted(self: ZeroEngine, *arguments: Any) -> ZeroRun:
    """`ZeroEngine.begin`, whose run can be looked at afterwards."""
    RUNS.append(begin(self, *arguments))
    return RUNS[-1]


class Stopped(Exception):
    """A job that is left half done."""


def play(
    folder: Path, world: World, name: str, stop: int | None = None, full: int | None = None, resume: bool = False, **changes: str
) -> dict[str, object]:
    """Losses and scores of each step of one job, or the fault that ended it; from step ``full`` on no file may be longer than 1 kB."""
    losses: list[dict[str, float]] = []
    scores: list[Scores] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    RUNS.clear()

    def heard(report: Report) -> None:
        if stop is not None and report.step > stop:
            raise Stopped
        losses.append({"all": report.loss, **report.losses, **report.told})
        scores.append(report.scores)
        if full is not None and report.step == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, hard))

    table = {key.replace("__", "."): value for key, value in changes.items()} | {"output": str(folder / name)}
    began = time.perf_counter()
    try:
        final = run(load_central(folder / "job.toml", table), world, progress=heard, resume=resume).scores
    except Stopped:
        final = {}
    except FedpeftError as fault:
        return {"fault": str(fault), "code": fault.exit_code, "seconds": time.perf_counter() - began}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    held = {"moments": moment_bytes(RUNS[-1]), "base": base_bytes(RUNS[0])}
    return {"losses": losses, "scores": scores, "final": final, "held": held}


def moment_bytes(run: ZeroRun) -> int:
    """What this rank's optimizer remembers."""
    optimizer = getattr(run._zero.optimizer, "optimizer", run._zero.optimizer)
    names = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
    kept = [state[name] for state in optimizer.state.values() for name in names if name in state]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def base_bytes(run: ZeroRun) -> int:
    """What this rank keeps of the frozen base: in stage 3 its part of each weight."""
    weights = [getattr(weight, "ds_tensor", weight) for weight in run.live.base.model.parameters() if not weight.requires_grad]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def waited(path: Path, seconds: float = 120.0) -> None:
    """Until ``path`` is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.1)


@contextmanager
def elsewhere() -> Iterator[None]:
    """As in another process, where other ways to multiply are the fastest."""
    known, seconds = dict(choice.FASTEST), choice._seconds
    choice.FASTEST.clear()
    choice._seconds = lambda *what: inf if (found := seconds(*what)) == inf else -found
    try:
        yield
    finally:
        choice._seconds = seconds
        choice.FASTEST.clear()
        choice.FASTEST.update(known)
