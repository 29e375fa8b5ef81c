"""Joint jobs on images: mixed batches are each task alone, scores are those of each adapter, and what is for texts alone is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.adapters import Adapter, attach, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.central.estimate import estimated
from fedpeft.central.joint import Joint, Mixed
from fedpeft.central.pool import Pool
from fedpeft.central.reading import digest_of
from fedpeft.central.scoring import Lockstep, Served
from fedpeft.central.stored import stored
from fedpeft.errors import BaseError, ConfigError
from fedpeft.methods import Lora
from fedpeft.mixtures import Bank
from fedpeft.tasks import Classification, Source, read_rows
from fedpeft.tensors import Tensors
from fedpeft.training import evaluate
from fedpeft.training.config import CentralConfig

TASKS = {name: Classification(name, tuple("0123456789")) for name in ("a", "b")}


@pytest.fixture(scope="module")
def base(vision_folder):
    return load_base(BaseSpec(str(vision_folder("ViT"))), "cpu")


@pytest.fixture(scope="module")
def rows(digits):
    found = read_rows(Source(path=str(digits), limit=12))
    return {"a": found[:6], "b": found[6:]}


def adapter(base, task, seed):
    spec = make_spec(task.name, base, Lora(r=2, targets=("all",)), task.head)
    return Adapter(spec, Tensors(spec.layout, np.random.default_rng(seed).normal(0, 0.05, spec.layout.size).astype(np.float32)))


def test_a_mixed_batch_gives_the_sums_and_gradients_of_each_task_alone(base, rows):
    picks, data = np.array([7, 0, 3, 10]), {name: task.encode(rows[name], base) for name, task in TASKS.items()}
    adapters, pool = {name: adapter(base, task, seed) for seed, (name, task) in enumerate(TASKS.items())}, Pool.of(TASKS, data)
    assert pool.lengths_of(picks).tolist() == [17] * 4
    assert digest_of(pool) == digest_of(Pool.of(TASKS, {name: task.encode(rows[name], base) for name, task in TASKS.items()}))
    assert digest_of(pool) != digest_of(Pool.of(TASKS, {"a": data["b"], "b": data["a"]}))
    with Joint.attach("job", base, pool, adapters) as joint:
        sums = joint.model(Mixed(pool, picks).part(0, 1))
        grads = {name: torch.autograd.grad(sums.sum(), list(joint.bank.parameters(name).values()), retain_graph=True) for name in TASKS}
    alone = {}
    for number, (name, task) in enumerate(TASKS.items()):
        own = [rows[name][int(pick) % 6] for pick in picks if pick // 6 == number]
        with attach(base, adapters[name].spec) as live:
            live.load(adapters[name].tensors)
            alone[name] = evaluate(live, task, data[name])
            (batch,) = task.batches(task.encode(own, base), 9, 0, 0)
            loss = task.loss(live.model, batch)
            loss.total.backward()
            torch.testing.assert_close(sums[number].detach(), loss.total.detach(), rtol=1e-5, atol=1e-4, check_dtype=False)
            found = torch.cat([gradient.flatten() for gradient in grads[name]])
            wanted = torch.cat([live.parameters[key].grad.flatten() for key in adapters[name].spec.layout.names])
            torch.testing.assert_close(found.norm(), wanted.norm(), rtol=1e-4, atol=1e-5)
    with Bank.attach(base, TASKS["a"].head, adapters, dense=True) as bank:
        for name, task in TASKS.items():
            model = Served(bank, name, 10)
            found = task.evaluate(model.eval(), data[name], base)
            assert found["correct"] == alone[name]["correct"]
            np.testing.assert_allclose(found["loss"], alone[name]["loss"], rtol=1e-5)
            model(**Lockstep(model, bank, name, "cpu")._nothing())  # what a rank that is done computes on


def test_what_is_for_texts_alone_is_refused(base, digits, tmp_path):
    with pytest.raises(ConfigError, match=r"tasks\.a\.stream: only texts are laid out on disk, and base .* reads images"):
        stored(tmp_path / "rows", TASKS["a"], Source(path=str(digits)), base)
    tasks = {"a": {"kind": "classification", "labels": ["0", "1"], "data": {"path": "rows.jsonl"}}}
    job = {"name": "job", "output": str(tmp_path), "base": {"model": base.spec.model}, "tasks": tasks}
    with pytest.raises(BaseError, match="what a vision encoder keeps for its backward pass is not known"):
        estimated(CentralConfig.model_validate(job), 1)
