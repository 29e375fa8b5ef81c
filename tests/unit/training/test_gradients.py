"""Masks, corrections, the mean gradient, FedProx and SGD against float64 references."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import ConfigError, UpdateError
from fedpeft.training import TrainJob, TrainSettings, train

BOTH = frozenset({"A", "B"})
SGD = TrainSettings(steps=5, batch_size=23, lr=0.02, clip=0.0, optimizer="sgd")
ADAMW = TrainSettings(steps=5, batch_size=7, lr=0.02, weight_decay=0.1, proximal=0.2)


def still(live):
    live.model[0].lora_dropout.p = 0.0
    return live


def gradients(live, data, A, B):
    """Float64 gradients of the mean loss over all rows, by hand: (A, B)."""
    W, rows = live.model[0].base_layer.weight.double().numpy(), data.double().numpy()
    x, y = rows[:, 0], rows[:, 1]
    error = 2 * (x @ W.T + x @ A.T @ B.T - y) / len(x)
    return B.T @ error.T @ x, error.T @ x @ A.T


def values(live):
    return live.model[0].A.detach().double().numpy().copy(), live.model[0].B.detach().double().numpy().copy()


@given(mask=st.lists(st.booleans(), min_size=20, max_size=20), kind=st.sampled_from(["adamw", "sgd"]))
@settings(max_examples=20, deadline=None)
def test_masked_values_keep_their_bits_and_leave_the_norm(toy_live, toy_task, toy_data, mask, kind):
    chosen, keep = replace(ADAMW, optimizer=kind), np.array(mask)
    live, free = still(toy_live()), still(toy_live())
    before = live.flat.clone()
    result = train(live, toy_task(), toy_data, chosen, TrainJob(BOTH, 3, mask=keep, want_gradient=True))
    assert torch.equal(live.flat[torch.from_numpy(~keep)], before[torch.from_numpy(~keep)])
    assert not result.gradient[~keep].any()
    train(free, toy_task(), toy_data, chosen, TrainJob(BOTH, 3))
    if keep.all():
        assert torch.equal(live.flat, free.flat)
    elif keep.any():
        assert not torch.equal(live.flat[torch.from_numpy(keep)], before[torch.from_numpy(keep)])


def test_a_mask_equals_sgd_on_the_masked_gradient(toy_live, toy_task, toy_data):
    live = still(toy_live())
    keep = np.random.default_rng(0).random(20) < 0.5
    A, B = values(live)
    for _ in range(3):
        g = np.concatenate([part.ravel() for part in gradients(live, toy_data, A, B)]) * keep
        g *= min(1.0, 0.5 / np.linalg.norm(g))
        A, B = A - 0.02 * g[:10].reshape(2, 5), B - 0.02 * g[10:].reshape(5, 2)
    train(live, toy_task(), toy_data, replace(SGD, steps=3, clip=0.5), TrainJob(BOTH, 3, mask=keep))
    np.testing.assert_allclose(live.flat.numpy(), np.concatenate([A.ravel(), B.ravel()]), atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_correction_and_its_mean_gradient(toy_live, toy_task, toy_data, momentum):
    live = still(toy_live())
    correction = np.random.default_rng(1).normal(size=20).astype(np.float32)
    A, B = values(live)
    speed, total = np.zeros(20), np.zeros(20)
    for _ in range(5):
        raw = np.concatenate([part.ravel() for part in gradients(live, toy_data, A, B)])
        total += raw
        speed = momentum * speed + raw + correction
        A, B = A - 0.02 * speed[:10].reshape(2, 5), B - 0.02 * speed[10:].reshape(5, 2)
    chosen = replace(SGD, momentum=momentum)
    result = train(live, toy_task(), toy_data, chosen, TrainJob(BOTH, 3, correction=correction, want_gradient=True))
    np.testing.assert_allclose(live.flat.numpy(), np.concatenate([A.ravel(), B.ravel()]), atol=1e-5)
    np.testing.assert_allclose(result.gradient, total / 5, atol=1e-5)


def test_the_mean_gradient_is_scaffolds_second_option(toy_live, toy_task, toy_data):
    """Karimireddy et al. 2020, arXiv 1910.06378, eq. 4: c_i - c + (x - y_i) / (K lr) is the mean raw gradient under SGD."""
    live = still(toy_live())
    own, common = (np.random.default_rng(seed).normal(size=20).astype(np.float32) for seed in (4, 5))
    before = live.flat.numpy().copy()
    result = train(live, toy_task(), toy_data, SGD, TrainJob(BOTH, 3, correction=common - own, want_gradient=True))
    option = own - common + (before - live.flat.numpy()) / (SGD.steps * SGD.lr)
    np.testing.assert_allclose(result.gradient, option, atol=1e-4)


def test_fedprox_ends_at_the_ridge_solution(toy_live, toy_task, toy_data):
    """With A fixed the loss is quadratic in B: min mean |Z B' - Y|^2 + mu/2 |B - B0|^2 has a closed form."""
    mu, live = 0.7, still(toy_live())
    A, B0 = values(live)
    rows, W = toy_data.double().numpy(), live.model[0].base_layer.weight.double().numpy()
    Z, Y = rows[:, 0] @ A.T, rows[:, 1] - rows[:, 0] @ W.T
    exact = np.linalg.solve(2 * Z.T @ Z / len(Z) + mu * np.eye(2), 2 * Z.T @ Y / len(Z) + mu * B0.T).T
    train(live, toy_task(), toy_data, replace(SGD, steps=300, lr=0.2, proximal=mu), TrainJob(frozenset("B"), 3))
    np.testing.assert_allclose(live.flat.numpy()[10:].reshape(5, 2), exact, atol=1e-5)
    assert np.linalg.norm(exact - B0) > 0.1


@pytest.mark.parametrize("stop", [1, 3])
def test_resuming_gives_the_same_bits(tmp_path, toy_live, toy_task, toy_data, stop):
    rng = np.random.default_rng(2)
    job = TrainJob(BOTH, 3, mask=rng.random(20) < 0.7, correction=rng.normal(size=20).astype(np.float32), want_gradient=True)
    chosen = replace(SGD, steps=6, batch_size=4, momentum=0.9, save_every=1)
    whole, broken, fresh = toy_live(), toy_live(), toy_live()
    expected = train(whole, toy_task(), toy_data, chosen, job)

    def interrupt(step, _loss):
        if step > stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, toy_task(), toy_data, chosen, replace(job, checkpoint=tmp_path, progress=interrupt))
    result = train(fresh, toy_task(), toy_data, chosen, replace(job, checkpoint=tmp_path))
    assert result.resumed_from == stop
    assert torch.equal(fresh.flat, whole.flat)
    assert np.array_equal(result.gradient, expected.gradient)


def test_a_checkpoint_under_another_correction_is_ignored(tmp_path, toy_live, toy_task, toy_data):
    job = TrainJob(BOTH, 3, tmp_path, correction=np.ones(20, np.float32))
    train(toy_live(), toy_task(), toy_data, SGD, job)
    assert train(toy_live(), toy_task(), toy_data, SGD, replace(job, correction=np.zeros(20, np.float32))).resumed_from == 0


def test_bad_jobs_are_named(toy_live, toy_task, toy_data):
    with pytest.raises(UpdateError, match=r"the job's mask has shape \[3\], roles \['B'\] need \[10\]"):
        train(toy_live(), toy_task(), toy_data, SGD, TrainJob(frozenset("B"), 1, mask=np.ones(3, bool)))
    with pytest.raises(ConfigError, match=r"training\.momentum = 0\.9 and training\.optimizer = 'adamw'.*set optimizer = 'sgd'"):
        TrainSettings(momentum=0.9)
