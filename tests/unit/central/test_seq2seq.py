"""Joint jobs on encoder-decoders: mixed batches are each task alone, rows on disk are those in memory, and what is not known is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedpeft.adapters import Adapter, attach, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.central.estimate import estimated
from fedpeft.central.joint import Joint, Mixed
from fedpeft.central.pool import Pool
from fedpeft.central.scoring import Scorer, Served
from fedpeft.central.stored import stored
from fedpeft.central.world import World
from fedpeft.errors import BaseError, ConfigError
from fedpeft.methods import Lora
from fedpeft.mixtures import Bank
from fedpeft.tasks import Classification, Generation, Source
from fedpeft.tasks.likelihood import batch_of
from fedpeft.tensors import Tensors
from fedpeft.training import evaluate
from fedpeft.training.config import CentralConfig
from fedpeft.training.modes import evaluating

ROWS = {
    "a": [{"prompt": f"w{i}" + " w3" * (i % 4), "completion": f"w{i + 9} w5"} for i in range(6)],
    "b": [{"prompt": f"w{i} w8 w9", "completion": "w1 " + "w2 " * (1 + i % 3)} for i in range(6)],
}
TEXTS = {name: [{"text": row["prompt"], "label": "xyz"[i % 3]} for i, row in enumerate(rows)] for name, rows in ROWS.items()}
TASKS = {
    "lm": {name: Generation(name, max_new_tokens=4, samples=4) for name in ROWS},
    "classes": {name: Classification(name, ("x", "y", "z")) for name in ROWS},
}


@pytest.fixture(scope="module")
def base(seq2seq_folder):
    return load_base(BaseSpec(str(seq2seq_folder("t5")), max_tokens=16), "cpu")


def adapter(base, task, seed):
    """One whose factors are both other than 0."""
    spec = make_spec(task.name, base, Lora(r=2, targets=("all",)), task.head)
    return Adapter(spec, Tensors(spec.layout, np.random.default_rng(seed).normal(0, 0.05, spec.layout.size).astype(np.float32)))


@pytest.mark.parametrize("kind", TASKS)
def test_a_mixed_batch_gives_the_sums_and_gradients_of_each_task_alone(base, kind):
    tasks, picks = TASKS[kind], np.array([7, 0, 3, 10])
    data = {name: task.encode((ROWS if kind == "lm" else TEXTS)[name], base) for name, task in tasks.items()}
    adapters, pool = {name: adapter(base, task, seed) for seed, (name, task) in enumerate(tasks.items())}, Pool.of(tasks, data)
    with Joint.attach("job", base, pool, adapters) as joint:
        sums = joint.model(Mixed(pool, picks).part(0, 1))
        grads = {name: torch.autograd.grad(sums.sum(), list(joint.bank.parameters(name).values()), retain_graph=True) for name in tasks}
    if kind == "lm":
        chosen = [(data["ab"[pick // 6]], pick % 6) for pick in picks.tolist()]
        assert pool.counts(picks).sum() == sum(len(own.ids[place]) - own.starts[place] for own, place in chosen)
    for number, (name, task) in enumerate(tasks.items()):
        own = [int(pick) % 6 for pick in picks if pick // 6 == number]
        with attach(base, adapters[name].spec) as live:
            live.load(adapters[name].tensors)
            rows = [(ROWS if kind == "lm" else TEXTS)[name][place] for place in own]
            (batch,) = task.batches(task.encode(rows, base), 9, 0, 0)
            loss = task.loss(live.model, batch)
            loss.total.backward()
            torch.testing.assert_close(sums[number].detach(), loss.total.detach(), rtol=1e-5, atol=1e-4, check_dtype=False)
            found = torch.cat([gradient.flatten() for gradient in grads[name]])
            wanted = torch.cat([live.parameters[key].grad.flatten() for key in adapters[name].spec.layout.names])
            torch.testing.assert_close(found.norm(), wanted.norm(), rtol=1e-4, atol=1e-5)


def test_a_bank_scores_as_each_adapter_alone_and_ranks_that_share_it_do_not_generate(base):
    tasks = TASKS["lm"]
    adapters = {name: adapter(base, task, seed) for seed, (name, task) in enumerate(tasks.items())}
    data = {name: task.encode(ROWS[name], base) for name, task in tasks.items()}
    alone = {}
    for name, task in tasks.items():
        with attach(base, adapters[name].spec) as live:
            live.load(adapters[name].tensors)
            alone[name] = evaluate(live, task, data[name])
    with Bank.attach(base, tasks["a"].head, adapters, dense=True) as bank:
        for name, task in tasks.items():
            model = Served(bank, name, 0)
            with evaluating(model):
                found = task.evaluate(model, data[name], base)
            assert found["rouge"] == alone[name]["rouge"]
            np.testing.assert_allclose(found["loss"], alone[name]["loss"], rtol=1e-5)
        with pytest.raises(ConfigError, match=r"tasks \['a', 'b'\]: ranks that share an encoder-decoder in stage 3 cannot generate"):
            Scorer(bank, World(0, 0, 2), True, tasks, data).require_forwards()


def test_rows_on_disk_are_those_in_memory(base, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row | {"split": "train"}) for row in ROWS["a"]))
    found, _ = stored(tmp_path / "rows", TASKS["lm"]["a"], Source(path=str(tmp_path / "a.jsonl")), base)
    wanted = TASKS["lm"]["a"].encode(ROWS["a"], base)
    ours, theirs = (batch_of(data, range(6), 6) for data in (found, wanted))
    assert found.paired
    assert torch.equal(ours.labels, theirs.labels)
    assert all(torch.equal(ours.inputs[name], theirs.inputs[name]) for name in theirs.inputs)


def test_memory_that_was_never_measured_is_not_told(base, tmp_path):
    tasks = {name: {"kind": "generation", "data": {"path": "rows.jsonl"}} for name in ROWS}
    job = {"name": "job", "output": str(tmp_path), "base": {"model": base.spec.model}, "tasks": tasks}
    with pytest.raises(BaseError, match="what an encoder-decoder keeps for its backward pass is not known"):
        estimated(CentralConfig.model_validate(job), 1)
