"""What ranks score, what that keeps, and what tasks gain from each other."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.integration.central.jobs import WORDS
from tests.integration.central.looking import values

from fedpeft.adapters import attach
from fedpeft.central.job import prepare
from fedpeft.tensors import Tensors
from fedpeft.training import checkpoint
from fedpeft.training.config import load_central

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1300)]


@pytest.mark.slow
def test_partitioned_ranks_score_as_one_process_does(folder, more):
    from fedpeft.bases import load_base
    from fedpeft.tasks import read_rows
    from fedpeft.training.loop import evaluate

    config = load_central(
        folder / "job.toml", {"tasks.animals.metrics": '["perplexity", "exact_match"]', "tasks.animals.max_new_tokens": "3"}
    )
    base = load_base(config.base, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        every = prepare(config, {}).adapters
        rows = {name: read_rows(config.tasks[name].data, "test") for name in every}
    assert {name: len(found) for name, found in rows.items()} == {"animals": 7, "colours": 1}
    for name, adapter in every.items():
        task = config.tasks[name].task
        with attach(base, adapter.spec) as live:
            live.load(Tensors(adapter.spec.layout, values(folder, "scored1")[f"{name}|value"]))
            alone = task.scores(evaluate(live, task, task.encode(rows[name], base)))
        for world in ("1.0", "2.0", "2.1"):
            for key in ("scored", "again"):
                last = more[world][key]["final"] if key == "again" else more[world][key]["scores"][-1]
                assert last[name] == pytest.approx(alone, rel=2e-4), (world, key)
    undisturbed = values(folder, "one0")
    assert all(np.array_equal(array, undisturbed[name]) for name, array in values(folder, "scored1").items())


@pytest.mark.slow
def test_the_latest_checkpoints_and_the_best_stay(folder, more):
    for world, name in (("1.0", "scored1"), ("2.0", "scored2")):
        perplexities = [scores["colours"]["perplexity"] for scores in more[world]["scored"]["scores"]]
        best = 1 + int(np.argmin(perplexities))
        kept = sorted(path.name for path in (folder / name / "checkpoint").glob("step-*"))
        assert kept == [f"step-{step:08}.safetensors" for step in sorted({best, 3, 4})]
        assert more[world]["scored"]["final"] == more[world]["scored"]["scores"][best - 1]


@pytest.mark.slow
def test_transfer_compares_each_task_alone_with_all(folder, more):
    table, two = (json.loads((folder / f"compared{size}" / "transfer.json").read_text()) for size in "12")
    for name in ("alone", "together"):
        assert two[name] == pytest.approx(table[name], rel=1e-4)
    for task in WORDS:
        assert table["metric"][task] == "perplexity"
        assert table["gain"][task] == pytest.approx(table["alone"][task] - table["together"][task])
        alone = checkpoint.read(folder / "compared1" / "transfer" / task / "checkpoint")
        together = checkpoint.read(folder / "compared1" / "transfer" / "together" / "checkpoint")
        assert (alone.tally.step, alone.tally.examples * 2) == (together.tally.step, together.tally.examples)
    assert table["pairs"] == {"animals+colours": table["gain"]}
    for world, times in (("1.0", 1), ("2.0", 1), ("2.1", 0)):
        said = (folder / f"more{world}.log").read_text()
        assert (said.count("training animals alone:"), said.count("gain of the task on the left")) == (times, times)
