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


def rack(run, usual, seed) -> int:
    """Start ``run`` again and again, kill each start at a random moment, eight times at most; the number of kills."""
    dice, kills = random.Random(seed), 0
    while True:
        child = spawn(run)
        time.sleep(dice.uniform(0.0, 0.5) * usual)
        if kills < 8:
            os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            return kills
        kills += 1


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_killed_at_random_moments(tmp_path, toy_live, toy_task, toy_data, seed):
    whole = toy_live()
    began = time.perf_counter()
    train(whole, toy_task(), toy_data, SETTINGS, TrainJob(BOTH, seed, tmp_path / "undisturbed"))
    usual = time.perf_counter() - began

    job = TrainJob(BOTH, seed, tmp_path / "state")
    kills = rack(lambda: train(toy_live(), toy_task(), toy_data, SETTINGS, job), usual, seed)

    last = toy_live()
    result = train(last, toy_task(), toy_data, SETTINGS, job)
    assert kills >= 1
    assert result.resumed_from == SETTINGS.steps
    assert torch.equal(last.flat, whole.flat)
    disk.clear(tmp_path / "state")
    assert not (tmp_path / "state").exists()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_real_model_with_dropout_is_killed(tmp_path, shared_models, shared_data):
    """Once after the first checkpoint and once after the second, each time in the middle of a window of two steps."""
    from fedpeft.adapters import attach, initial, make_spec
    from fedpeft.bases import BaseSpec, load_base
    from fedpeft.methods import Lora
    from fedpeft.tasks import Generation, Source, read_rows

    base = load_base(BaseSpec(str(shared_models / "stories260k"), max_tokens=128), "cpu")
    task = Generation("slots", metrics=("perplexity",))
    rows = read_rows(Source(path=str(shared_data / "snips_slots.jsonl"), where={"client": "RateBook"}, limit=60), "train")
    data, spec = task.encode(rows, base), make_spec("slots", base, Lora(dropout=0.1), task.head)
    start, chosen = initial(base, spec, 0).tensors, TrainSettings(steps=6, batch_size=2, lr=1e-2, save_every=2)

    def run(folder, last=0):
        def heard(step, _loss):
            if step == last:
                os.kill(os.getpid(), signal.SIGKILL)

        with attach(base, spec) as live:
            live.load(start)
            return train(live, task, data, chosen, TrainJob(spec.layout.roles, 5, folder, heard)), live.read()

    _, whole = run(tmp_path / "undisturbed")
    for last in (3, 5):
        child = spawn(lambda: run(tmp_path / "state", last))  # noqa: B023 - used within the iteration
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    result, resumed = run(tmp_path / "state")
    assert result.resumed_from == 4
    assert resumed.digest == whole.digest
