"""kill -9 of a training process at any moment: the job that resumes ends at the bits of the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch

from fedpeft.training import TrainJob, TrainSettings, train
from fedpeft.training import checkpoint as disk

SETTINGS = TrainSettings(steps=60, batch_size=4, lr=0.02, save_every=1, accumulate=2)
BOTH = frozenset({"A", "B"})


def spawn(run) -> int:
    """The process id of a forked child that runs ``run`` and leaves without any clean-up."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    return child


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(tmp_path, toy_live, toy_task, toy_data, seed):
    whole = toy_live()
    began = time.perf_counter()
    train(whole, toy_task(), toy_data, SETTINGS, TrainJob(BOTH, seed, tmp_path / "undisturbed"))
    usual, dice, kills = time.perf_counter() - began, random.Random(seed), 0

    job = TrainJob(BOTH, seed, tmp_path / "state")
    while True:
        child = spawn(lambda: train(toy_live(), toy_task(), toy_data, SETTINGS, job))
        time.sleep(dice.uniform(0.0, 0.5) * usual)
        if kills < 8:
            os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            break
        kills += 1

    last = toy_live()
    result = train(last, toy_task(), toy_data, SETTINGS, job)
    assert kills >= 1
    assert result.resumed_from == SETTINGS.steps
    assert torch.equal(last.flat, whole.flat)
    disk.clear(tmp_path / "state")
    assert not (tmp_path / "state").exists()
