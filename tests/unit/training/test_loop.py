"""The loop on a toy whose reference is written out in float64."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import ConfigError, DataError, StorageError, UpdateError
from fedpeft.training import TrainJob, TrainSettings, evaluate, train
from fedpeft.training import checkpoint as disk
from fedpeft.training.engine import rate, schedule

BOTH = frozenset({"A", "B"})
PLAIN = TrainSettings(steps=7, batch_size=6, lr=0.02, save_every=2)


def still(live):
    """The same live adapter without dropout."""
    live.model[0].lora_dropout.p = 0.0
    return live


def reference(live, data, settings, seed, roles):
    """AdamW, FedProx, clipping and exact normalisation in float64, gradients by hand."""
    W = live.model[0].base_layer.weight.double().numpy()
    values = {"A": live.model[0].A.detach().double().numpy().copy(), "B": live.model[0].B.detach().double().numpy().copy()}
    start = {role: value.copy() for role, value in values.items()}
    m = {role: np.zeros_like(v) for role, v in values.items()}
    v = {role: np.zeros_like(x) for role, x in values.items()}
    rows, order, epoch = data.double().numpy(), [], 0
    for step in range(settings.steps):
        window = []
        for _ in range(settings.accumulate):
            if not order:
                permutation = np.random.default_rng((seed, epoch)).permutation(len(rows))
                order = [permutation[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
                epoch += 1
            window.append(order.pop(0))
        picked = rows[np.concatenate(window)]
        x, y = picked[:, 0], picked[:, 1]
        error = 2 * (x @ W.T + x @ values["A"].T @ values["B"].T - y) / len(x)
        grads = {"A": values["B"].T @ error.T @ x, "B": error.T @ x @ values["A"].T}
        grads = {role: grads[role] + settings.proximal * (values[role] - start[role]) for role in roles}
        norm = sqrt(sum(float((g**2).sum()) for g in grads.values()))
        factor = min(1.0, settings.clip / (norm + 1e-6)) if settings.clip else 1.0
        for role in roles:
            g, lr = grads[role] * factor, rate(settings, None, role) * schedule(settings, step)
            m[role] = 0.9 * m[role] + 0.1 * g
            v[role] = 0.999 * v[role] + 0.001 * g * g
            values[role] *= 1 - lr * settings.weight_decay
            values[role] -= lr * (m[role] / (1 - 0.9 ** (step + 1))) / (np.sqrt(v[role] / (1 - 0.999 ** (step + 1))) + 1e-8)
    return np.concatenate([values["A"].ravel(), values["B"].ravel()])


@given(
    steps=st.integers(1, 9),
    batch_size=st.integers(1, 30),
    accumulate=st.integers(1, 4),
    clip=st.sampled_from([0.0, 0.5, 100.0]),
    proximal=st.sampled_from([0.0, 0.3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    warmup=st.integers(0, 4),
    kind=st.sampled_from(["constant", "linear", "cosine"]),
    roles=st.sampled_from([frozenset("A"), frozenset("B"), BOTH]),
)
@settings(max_examples=30, deadline=None)
def test_equals_the_float64_reference(
    toy_live, toy_task, toy_data, steps, batch_size, accumulate, clip, proximal, weight_decay, warmup, kind, roles
):
    chosen = TrainSettings(
        steps=steps, batch_size=batch_size, lr=0.01, lr_by_role={"B": 0.03}, weight_decay=weight_decay, warmup=warmup,
        schedule=kind, accumulate=accumulate, clip=clip, proximal=proximal,
    )  # fmt: skip
    live = still(toy_live())
    expected = reference(live, toy_data, chosen, 5, roles)
    result = train(live, toy_task(), toy_data, chosen, TrainJob(roles, seed=5))
    np.testing.assert_allclose(live.flat.numpy(), expected, atol=2e-5)
    assert result.steps == steps
    assert result.examples == result.tokens == result.count


@given(stop=st.integers(0, 6), seed=st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_resuming_gives_the_same_bits(tmp_path_factory, toy_live, toy_task, toy_data, stop, seed):
    folder = tmp_path_factory.mktemp("job")
    whole, broken = toy_live(), toy_live()
    expected = train(whole, toy_task(), toy_data, PLAIN, TrainJob(BOTH, seed))

    def interrupt(step, _loss):
        if step > stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, toy_task(), toy_data, PLAIN, TrainJob(BOTH, seed, folder / "state", interrupt))
    fresh = toy_live()
    result = train(fresh, toy_task(), toy_data, PLAIN, TrainJob(BOTH, seed, folder / "state"))
    assert torch.equal(fresh.flat, whole.flat)
    assert result.resumed_from == stop // 2 * 2
    assert replace(result, resumed_from=0, seconds=0) == replace(expected, seconds=0)


def test_a_finished_job_answers_at_once_and_is_cleared(tmp_path, toy_live, toy_task, toy_data):
    job = TrainJob(BOTH, 3, tmp_path / "state")
    first, again, task = toy_live(), toy_live(), toy_task()
    train(first, toy_task(), toy_data, PLAIN, job)
    assert train(again, task, toy_data, PLAIN, job).resumed_from == 7
    assert torch.equal(first.flat, again.flat)
    disk.clear(tmp_path / "state")
    assert not (tmp_path / "state").exists()
    disk.clear(tmp_path / "state")


@pytest.mark.parametrize("change", ["seed", "start", "settings", "roles", "schema"])
def test_a_checkpoint_of_another_job_is_ignored(tmp_path, toy_live, toy_task, toy_data, change, caplog):
    caplog.set_level(logging.INFO)
    train(toy_live(), toy_task(), toy_data, PLAIN, TrainJob(BOTH, 3, tmp_path))
    live, chosen, job = toy_live(seed=int(change == "start")), PLAIN, TrainJob(BOTH, 3, tmp_path)
    if change == "schema":
        live.spec.schema = "other"
    chosen = replace(chosen, lr=0.5) if change == "settings" else chosen
    job = replace(job, seed=4) if change == "seed" else job
    job = replace(job, roles=frozenset("A")) if change == "roles" else job
    assert train(live, toy_task(), toy_data, chosen, job).resumed_from == 0
    assert "belongs to another job" in caplog.text


@given(where=st.floats(0, 1, exclude_max=True), cut=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_torn_or_altered_file_is_never_taken(tmp_path_factory, where, cut):
    folder = tmp_path_factory.mktemp("torn")
    disk.save(folder, disk.Checkpoint("job", disk.Tally(4, 1.5, 2, 3, 4, 5.0), {"A.value": np.arange(9, dtype=np.float32)}))
    path = folder / disk.FILE
    body = bytearray(path.read_bytes())
    place = int(where * len(body))
    path.write_bytes(bytes(body[:place]) if cut else bytes(body[:place]) + bytes([body[place] ^ 0x55]) + bytes(body[place + 1 :]))
    found = disk.load(folder, "job")
    assert found is None or (found.tally == disk.Tally(4, 1.5, 2, 3, 4, 5.0) and np.array_equal(found.arrays["A.value"], np.arange(9)))


def test_a_checkpoint_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        disk.save(tmp_path / "file", disk.Checkpoint("job", disk.Tally(), {}))


def test_a_failed_write_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    disk.save(tmp_path, disk.Checkpoint("job", disk.Tally(2), {"x": np.ones(3, np.float32)}))

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        disk.save(tmp_path, disk.Checkpoint("job", disk.Tally(4), {"x": np.zeros(3, np.float32)}))
    assert disk.load(tmp_path, "job").tally.step == 2
    assert [path.name for path in tmp_path.iterdir()] == [disk.FILE]


def test_untrained_roles_do_not_move_and_randomness_is_left_alone(toy_live, toy_task, toy_data):
    live = toy_live()
    before, state = live.flat.clone(), torch.get_rng_state()
    train(live, toy_task(), toy_data, PLAIN, TrainJob(frozenset("B"), 1))
    span = live.spec.layout.role_spans["A"]
    assert torch.equal(live.flat[span], before[span])
    assert not torch.equal(live.flat, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_adapters_dropout_is_on_by_default(toy_live, toy_task, toy_data):
    live = toy_live()
    live.model.eval()
    seen = []

    def look(_step, _loss):
        seen.append((live.model[0].lora_dropout.training, live.model[0].base_layer.training, live.model[1].training))

    for base_dropout in (False, True):
        train(live, toy_task(), toy_data, replace(PLAIN, steps=1, base_dropout=base_dropout), TrainJob(BOTH, 1, None, look))
    assert seen == [(True, False, False), (True, True, True)]
    assert not any(module.training for module in live.model.modules())


def test_evaluate_restores_modes(toy_live, toy_task, toy_data):
    live = toy_live()
    live.model.train()
    assert evaluate(live, toy_task(), toy_data)["count"] == (23.0,)
    assert all(module.training for module in live.model.modules())


def test_not_finite_names_the_step_and_keeps_the_values(toy_live, toy_task, toy_data):
    live = toy_live()
    data = toy_data.clone()
    data[4] = float("nan")
    with pytest.raises(UpdateError, match=r"step \d of 7 has loss nan.*lower training\.lr \(now 0\.02\)") as fault:
        train(live, toy_task(), data, PLAIN, TrainJob(BOTH, 1))
    assert "\n" not in str(fault.value)
    assert torch.isfinite(live.flat).all()


def test_bad_requests_are_named(toy_live, toy_task, toy_data):
    with pytest.raises(UpdateError, match=r"roles \['Q'\] to train; the adapter has \['A', 'B'\]"):
        train(toy_live(), toy_task(), toy_data, PLAIN, TrainJob(frozenset("Q"), 1))
    with pytest.raises(DataError, match="no example to train on"):
        train(toy_live(), toy_task(), toy_data[:0], PLAIN, TrainJob(BOTH, 1))
    for wrong in ({"steps": 0}, {"lr": float("nan")}, {"lr_by_role": {"B": -1.0}}, {"clip": -1.0}, {"accumulate": 0}):
        with pytest.raises(ConfigError, match=r"training\."):
            TrainSettings(**wrong)
    with pytest.raises(UpdateError, match="cannot checkpoint activations"):
        train(toy_live(), toy_task(), toy_data, replace(PLAIN, checkpoint_activations=True), TrainJob(BOTH, 1))


def test_progress_counts_steps_and_means(toy_live, toy_task, toy_data):
    heard = []
    result = train(toy_live(), toy_task(), toy_data, PLAIN, TrainJob(BOTH, 1, None, lambda step, loss: heard.append((step, loss))))
    assert [step for step, _ in heard] == list(range(1, 8))
    assert result.loss == pytest.approx(result.loss_sum / result.count)
    assert result.tokens_per_second > 0


def test_order_is_the_tasks_own(toy_live, toy_task, toy_data):
    task = toy_task()
    train(toy_live(), task, toy_data, replace(PLAIN, steps=4), TrainJob(BOTH, 9))
    assert sorted(sum(task.seen, ())) == list(range(23))
