"""Several adapters as one thing to train, and as one model to score; without ranks and without DeepSpeed's engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedpeft.adapters import Adapter, attach, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.central.engine import ZeroRun
from fedpeft.central.job import Trained
from fedpeft.central.joint import Joint, JointTask, Mixed
from fedpeft.central.pool import Pool
from fedpeft.central.publish import publish, starts
from fedpeft.central.scoring import Served
from fedpeft.central.world import World, joined
from fedpeft.errors import AdapterError, ConfigError, LinkError
from fedpeft.methods import Lora
from fedpeft.mixtures import Bank
from fedpeft.processes import free_port
from fedpeft.tasks import Classification, Generation
from fedpeft.tasks.likelihood import padding
from fedpeft.tensors import Tensors
from fedpeft.training import evaluate
from fedpeft.training.modes import evaluating
from fedpeft.training.settings import TrainSettings

ROWS = {
    "a": [{"prompt": f"Once upon a time {'a cat ' * (i % 4)}", "completion": f"it slept {i}"} for i in range(6)],
    "b": [{"prompt": f"Lily saw {i} birds", "completion": "they " + "flew " * (1 + i % 3)} for i in range(6)],
}


@pytest.fixture(scope="module")
def base(shared_models):
    return load_base(BaseSpec(str(shared_models / "stories260k"), max_tokens=64), "cpu")


def adapter(base, task, seed):
    """One whose factors are both other than 0."""
    spec = make_spec(task.name, base, Lora(r=2, targets=("all",)), task.head)
    draw = np.random.default_rng(seed)
    return Adapter(spec, Tensors(spec.layout, draw.normal(0, 0.05, spec.layout.size).astype(np.float32)))


@pytest.fixture(scope="module")
def joint(base):
    tasks = {name: Generation(name, metrics=("perplexity",)) for name in ROWS}
    data = {name: task.encode(ROWS[name], base) for name, task in tasks.items()}
    adapters = {name: adapter(base, task, seed) for seed, (name, task) in enumerate(tasks.items())}
    pool = Pool.of(tasks, data)
    with Joint.attach("job", base, pool, adapters) as live:
        yield SimpleNamespace(live=live, tasks=tasks, data=data, adapters=adapters, pool=pool)
    assert base.holder is None


def test_a_batch_filled_up_gives_what_the_packed_one_gives(joint):
    parameters = [p for name in joint.live.specs for p in joint.live.bank.parameters(name).values()]
    picks = np.array([7, 0, 3, 10])
    part = joint.pool.part(picks)
    calls: list[tuple[int, ...]] = []
    hook = joint.live.bank.model.register_forward_pre_hook(
        lambda _model, _arguments, named: calls.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    with padding():
        sums = joint.live.model(part)
    padded = torch.autograd.grad(sums.sum(), parameters)
    packed_sums = joint.live.model(part)
    packed = torch.autograd.grad(packed_sums.sum(), parameters)
    hook.remove()
    lengths = joint.pool.lengths_of(picks)
    assert calls == [(4, lengths.max()), (1, lengths.sum())]
    torch.testing.assert_close(sums, packed_sums, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_mixed_batch_gives_the_sums_and_gradients_of_each_task_alone(base, joint):
    picks = np.array([7, 0, 3, 10])
    sums = joint.live.model(Mixed(joint.pool, picks).part(0, 1))
    grads = torch.autograd.grad(sums.sum(), [p for name in joint.live.specs for p in joint.live.bank.parameters(name).values()])
    joint.live.bank.detach()
    found = []
    for number, (name, task) in enumerate(joint.tasks.items()):
        own = [int(pick - joint.pool.firsts[number]) for pick in picks if joint.pool.owners_of(pick) == number]
        with attach(base, joint.adapters[name].spec) as live:
            live.load(joint.adapters[name].tensors)
            from fedpeft.tasks.likelihood import packed

            loss = task.loss(live.model, packed(joint.data[name], own, len(own)))
            loss.total.backward()
            torch.testing.assert_close(sums[number], loss.total.detach(), rtol=1e-5, atol=1e-4, check_dtype=False)
            assert loss.count == joint.pool.counts(picks)[number]
            found += [live.parameters[key].grad.clone() for key in joint.live.bank._own[name]]
    for ours, theirs in zip(grads, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_lanes_of_a_shared_adapter_hold_what_each_task_asks_of_it(base):
    tasks = {name: Generation(name, metrics=("perplexity",)) for name in ROWS}
    pool = Pool.of(tasks, {name: task.encode(ROWS[name], base) for name, task in tasks.items()})
    adapters = {name: adapter(base, task, seed) for seed, (name, task) in enumerate(tasks.items())}
    mixed = Mixed(pool, np.array([7, 0, 3, 10, 2]))
    with Joint.attach("job", base, pool, adapters, adapter(base, Generation("s"), 9)) as live:
        shared = live.bank.parameters("(shared)")
        plain = live.model(mixed.part(0, 1))
        alone = [torch.autograd.grad(loss, list(shared.values()), retain_graph=True) for loss in plain]
        lanes, layout = live.split(), live.specs["(shared)"].layout
        sums = live.model(mixed.part(0, 1))
        torch.testing.assert_close(sums, plain)
        whole = torch.autograd.grad(sums.sum(), list(shared.values()))
    assert lanes.is_contiguous()
    for name, own, *each in zip(shared, whole, *alone, strict=True):
        torch.testing.assert_close(own, sum(each), rtol=1e-4, atol=1e-5)
        for lane, wanted in zip(lanes, each, strict=True):
            torch.testing.assert_close(lane[layout.spans[name]].view(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_was_switched_off_is_refused(base):
    task = Generation("a", metrics=("perplexity",))
    pool = Pool.of({"a": task, "b": task}, dict.fromkeys("ab", task.encode(ROWS["a"], base)))
    with Joint.attach("job", base, pool, {name: adapter(base, Generation(name), 0) for name in "ab"}) as live:
        run = ZeroRun(
            SimpleNamespace(world=World(), table={}, balancing=None), live, JointTask("job", pool, {"a": 0.5, "b": 0.5}, 1), TrainSettings()
        )
        run._require_present()
        live.bank.train(["a"])
        with pytest.raises(AdapterError, match=r"\['b'\] were switched off"):
            run._require_present()
        with pytest.raises(AdapterError, match="trains all roles"):
            live.train_roles({"A"})


def test_a_served_bank_scores_as_the_adapter_alone(base, small_encoder):
    encoder = load_base(BaseSpec(str(small_encoder), max_tokens=32), "cpu")
    kinds = [
        (base, [Generation("a", metrics=("perplexity", "exact_match"), max_new_tokens=4), Generation("b", metrics=("perplexity",))], ROWS),
        (encoder, [Classification("c", ("x", "y")), Classification("d", ("x", "y", "z"))],
         {name: [{"text": f"word {i}", "label": "xy"[i % 2]} for i in range(9)] for name in "cd"}),
    ]  # fmt: skip
    for model, tasks, rows in kinds:
        every = {task.name: adapter(model, task, seed) for seed, task in enumerate(tasks)}
        alone = {}
        for task in tasks:
            with attach(model, every[task.name].spec) as live:
                live.load(every[task.name].tensors)
                alone[task.name] = evaluate(live, task, task.encode(rows[task.name], model))
        with Bank.attach(model, tasks[0].head, every) as bank:
            for task in tasks:
                served = Served(bank, task.name, len(task.head.labels))
                with evaluating(served), torch.no_grad():
                    found = task.evaluate(served, task.encode(rows[task.name], model), model)
                assert found.keys() == alone[task.name].keys()
                for key, value in found.items():
                    np.testing.assert_allclose(value, alone[task.name][key], rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.filterwarnings("ignore")
def test_a_rank_that_never_comes_ends_the_wait():
    with pytest.raises(LinkError, match=r"not all ranks met at 127\.0\.0\.1"), joined(World(0, 0, 2, "127.0.0.1", free_port()), 1.0):
        pass


def test_versions_have_their_lineage_and_the_same_values_one_version(base, tmp_path):
    task = Generation("a", metrics=("perplexity",))
    every = {"a": adapter(base, task, 0), "(shared)": adapter(base, Generation("job.shared"), 1)}
    settings = TrainSettings(steps=9)
    config = SimpleNamespace(
        name="job", registry=tmp_path / "r", output=tmp_path, base=BaseSpec("m"), training=settings, tasks={"a": SimpleNamespace(task=task)}
    )
    first = publish(config, Trained(every, 7, {"a": {"perplexity": 2.0}}, {"a": 5, "b": 6}), {"a": "f" * 64})
    assert [version.task for version in first] == ["a", "job.shared"]
    own, shared = (version.manifest for version in first)
    assert (own.scheme, own.round, own.parents, own.examples, dict(own.metrics)) == ("central", 7, ("f" * 64,), 5, {"perplexity": 2.0})
    assert (shared.parents, shared.examples) == ((), 11)
    assert [version.digest for version in publish(config, Trained(every, 7, {}, {}), {})] == [version.digest for version in first]
    given, parents = starts(config, ["version:a@1", "job.shared"])
    assert given["a"].digest == every["a"].digest
    assert parents["a"] == first[0].digest
    with pytest.raises(ConfigError, match="given already"):
        starts(config, ["a", "a@1"])
    with pytest.raises(ConfigError, match="names no registry"):
        starts(SimpleNamespace(**vars(config) | {"registry": None}), ["a"])
