"""The private engine: clipped sums, noise, sampling, what leaves, what is checked, what a killed job does."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from tests.unit.training.private import SGD, TASK, Seeded, clipped_sum, place, private, rows

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.config import build
from fedpeft.errors import DataError, PrivacyError
from fedpeft.methods import Lora
from fedpeft.privacy.accounting import Event
from fedpeft.privacy.noise import SecureNoise
from fedpeft.tasks import Encoded, Generation
from fedpeft.training import ENGINES, TrainJob, TrainSettings, dp, dp_check, engine, train
from fedpeft.training.dp import FLOAT, DpEngine
from fedpeft.training.dp_sampling import batches_of
from fedpeft.training.dp_sums import singles, terms_of
from fedpeft.training.modes import evaluating, training


def test_a_step_moves_by_the_clipped_sum_over_the_expected_batch(live):
    run, data, start = private(live, source=Seeded(scale=0.0)), rows(5), live.flat.double().numpy()
    window = list(batches_of(TASK, data, np.arange(5), 3))
    assert [batch.examples for batch in window] == [3, 2]
    with training(live.model, SGD):
        found = [clipped_sum(live, batch, 0.1 * (1 - FLOAT)) for batch in window]
        norms = np.concatenate([norms for _, norms in found])
        assert norms.max() > 0.1 > norms.min() or norms.min() > 0.1
        run.step(0, window)
    expected = sum(total for total, _ in found) / run.expected
    np.testing.assert_allclose((start - live.flat.double().numpy()) / SGD.lr, expected, atol=3e-7)


def test_small_gradients_are_not_scaled(live):
    run = private(live, engine=DpEngine(1e-3, 1e4), source=Seeded(scale=0.0))
    (batch,) = batches_of(TASK, rows(4), np.arange(4), 4)
    start = live.flat.double().numpy()
    with training(live.model, SGD):
        expected, norms = clipped_sum(live, batch, 1e9)
        run.step(0, [batch])
    assert norms.max() < 1e3
    np.testing.assert_allclose((start - live.flat.double().numpy()) / SGD.lr, expected / 8, atol=1e-5 * np.abs(expected).max())


def test_noise_has_the_deviation_that_was_promised_and_an_empty_draw_still_steps(live):
    run, start = private(live, engine=DpEngine(2.0, 0.3), source=SecureNoise()), live.flat.clone()
    assert run.step(0, []) == run.step(1, [])
    moved = (start - live.flat).double().numpy() / SGD.lr * run.expected / (2.0 * 0.3 * np.sqrt(2))
    assert abs(moved.mean()) < 5 / np.sqrt(moved.size)
    assert moved.std() == pytest.approx(1.0, abs=5 / np.sqrt(2 * moved.size))
    assert np.abs(moved).max() > 2.5


def test_one_example_more_moves_the_sum_by_no_more_than_the_clip(live):
    data, sums = rows(6, 3), []
    with training(live.model, SGD):
        for count in (5, 6):
            place(live)
            run = private(live, engine=DpEngine(1.0, 0.05), source=Seeded(scale=0.0))
            before = live.flat.double().numpy()
            run.step(0, list(batches_of(TASK, data, np.arange(count), 4)))
            sums.append((before - live.flat.double().numpy()) / SGD.lr * run.expected)
    assert 0.0 < np.linalg.norm(sums[1] - sums[0]) <= 0.05 + 1e-5


class Narrow(torch.autograd.Function):
    """The identity, whose gradient goes through fp16."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.half().float()


@pytest.mark.parametrize("narrow", [False, True])
def test_clipping_acts_on_gradients_that_are_not_scaled_and_an_overflow_takes_a_smaller_scale(live, monkeypatch, narrow):
    """Alone, one loss term has the whole scale, 2^16, which fp16 does not hold; nobody is skipped for it."""
    data = Encoded((np.array([5, 60, 7], np.int32),), np.arange(1), np.array([2]), np.arange(1), 0)
    (batch,) = batches_of(TASK, data, np.arange(1), 1)
    assert terms_of(batch).tolist() == [1.0]
    original, found = Generation.loss, []
    for precision in ("fp32", "fp16"):
        place(live)
        run = private(live, replace(SGD, precision=precision), source=Seeded(scale=0.0))
        assert run.state().keys() == {"A.value", "B.value"} | ({"(scale)"} if precision == "fp16" else set())
        if narrow:
            monkeypatch.setattr(Generation, "loss", lambda *a: replace((loss := original(*a)), total=Narrow.apply(loss.total)))
        with training(live.model, SGD):
            run.step(0, [batch])
        found.append(live.flat.clone())
    assert torch.equal(*found)
    place(live)
    assert not torch.equal(live.flat, found[0])


@pytest.mark.parametrize(("power", "clip"), [(16, 1e3), (28, 0.1)])
def test_private_steps_in_fp16_arithmetic_are_nearly_those_in_fp32_whatever_overflows(live, monkeypatch, clip, power):
    data, moved = rows(3, 7), []
    monkeypatch.setattr(dp, "START", 2.0**power)
    for precision in ("fp32", "fp16"):
        monkeypatch.setattr(engine, "half_of", lambda settings, device: torch.float16 if settings.precision == "fp16" else None)
        place(live)
        start = live.flat.clone()
        run = private(live, replace(SGD, precision=precision), DpEngine(1.0 if clip < 1 else 1e-9, clip), Seeded(scale=0.0))
        dp_check.check(run.recorder, live, TASK, data)
        with training(live.model, SGD):
            run.step(0, list(batches_of(TASK, data, np.arange(3), 3)))
        moved.append(live.flat - start)
    assert float((moved[1] - moved[0]).norm() / moved[0].norm()) < 0.02


def test_an_example_with_a_gradient_that_is_not_finite_adds_nothing(live, monkeypatch):
    data = rows(4)
    (batch,) = batches_of(TASK, data, np.arange(4), 4)
    original = Generation.loss

    def broken(task, model, part):
        loss = original(task, model, part)
        bad = bool((part.inputs["input_ids"] == int(data.ids[0][0])).any())
        return replace(loss, total=loss.total + (loss.total * float("inf"))) if bad else loss

    with training(live.model, SGD):
        wanted = sum(
            clipped_sum(live, one, 0.1 * (1 - FLOAT))[0] for one in singles(batch) if int(data.ids[0][0]) not in one.inputs["input_ids"]
        )
        monkeypatch.setattr(Generation, "loss", broken)
        start = live.flat.double().numpy()
        private(live, source=Seeded(scale=0.0)).step(0, [batch])
    np.testing.assert_allclose((start - live.flat.double().numpy()) / SGD.lr * 8, wanted, atol=3e-6)


def test_a_private_job_answers_with_its_cost_and_no_sums(live):
    heard, data = [], rows(40)
    settings = TrainSettings(steps=5, batch_size=4, accumulate=2, lr=1e-3)
    start = live.flat.clone()
    job = TrainJob(live.spec.layout.roles, 0, None, lambda step, loss: heard.append((step, loss)))
    result = train(live, TASK, data, settings, job, DpEngine(1.3, 0.5))
    assert result.private == Event(1.3, 8 / 40, 5)
    assert (result.steps, result.loss_sum, result.count, result.examples, result.tokens) == (5, 0.0, 0, 0, 0)
    assert [step for step, _ in heard] == [1, 2, 3, 4, 5]
    assert all(not torch.equal(live.flat[span], start[span]) for span in live.spec.layout.spans.values())
    assert train(live, TASK, data, settings, job).private is None


def test_frozen_roles_stay_and_the_check_leaves_no_trace(live):
    before, state = live.flat.clone(), torch.get_rng_state()
    run = private(live, roles=frozenset("B"))
    with training(live.model, SGD):
        run.windows(rows(10))
        assert torch.equal(live.flat, before)
        assert not live.grad.any()
        run.step(0, [])
    spans = live.spec.layout.role_spans
    assert torch.equal(live.flat[spans["A"]], before[spans["A"]])
    assert not torch.equal(live.flat[spans["B"]], before[spans["B"]])
    torch.set_rng_state(state)


def test_learning_with_little_noise(causal):
    spec, data = make_spec("t", causal, Lora(r=8, targets=("all",)), TASK.head), rows(12, 5)
    with attach(causal, spec) as live:
        live.load(initial(causal, spec, 0).tensors)
        losses = []
        job = TrainJob(spec.layout.roles, 0, None, lambda _step, loss: losses.append(loss))
        train(live, TASK, data, TrainSettings(steps=15, batch_size=12, lr=2e-2), job, DpEngine(0.05, 1.0))
    assert losses[-1] < 0.8 * losses[0]


def test_the_steps_noisy_gradient_is_what_a_scheme_is_given(live):
    run = private(live, want_gradient=True)
    start = live.flat.clone()
    run.step(0, [])
    np.testing.assert_allclose((start - live.flat).numpy() / SGD.lr, run.gradient(1), atol=1e-6)


def test_a_killed_job_goes_on_and_counts_its_steps_once(tmp_path, live):
    settings, data = TrainSettings(steps=4, batch_size=4, save_every=2, lr=1e-3), rows(20)
    start, engine = live.read(), DpEngine(1.0)

    def stop(step, _loss):
        if step == 3:
            raise KeyboardInterrupt

    job = TrainJob(live.spec.layout.roles, 0, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(live, TASK, data, settings, replace(job, progress=stop), engine)
    live.load(start)
    assert train(live, TASK, data, settings, job, DpEngine(2.0)).resumed_from == 0, "another noise is another job"
    live.load(start)
    with pytest.raises(KeyboardInterrupt):
        train(live, TASK, data, settings, replace(job, progress=stop), engine)
    live.load(start)
    result = train(live, TASK, data, settings, job, engine)
    assert (result.resumed_from, result.private) == (2, Event(1.0, 0.2, 4))
    live.load(start)
    assert train(live, TASK, data, settings, job).resumed_from == 0, "a job without privacy does not take over a private one"


def test_a_model_that_mixes_rows_is_refused(live):
    data, run = rows(10), private(live)

    def leak(_module, _inputs, output):
        return output + 0.05 * output.mean(1, keepdim=True)

    handle = live.model.get_submodule("model.layers.0.mlp").register_forward_hook(leak)
    with pytest.raises(PrivacyError, match="method lora are not those of the examples alone"), training(live.model, SGD):
        run.windows(data)
    handle.remove()
    with training(live.model, SGD):
        run.windows(data)


def test_batch_normalisation_at_work_is_refused(live):
    live.model.norm = torch.nn.BatchNorm1d(4)
    try:
        with pytest.raises(PrivacyError, match="batch normalisation mixes"), training(live.model, replace(SGD, base_dropout=True)):
            private(live).windows(rows(5))
    finally:
        del live.model.norm


def test_noise_that_no_optimizer_reads_is_found(live):
    run = private(live)
    for param in run.local.params.values():
        param.grad = param.grad.clone()
        param.data = param.data.clone()
    with pytest.raises(PrivacyError, match=r"\d+ of \d+ trained tensors did not move"):
        run.step(0, [])
    assert dp_check.moved(live, run.trained, live.flat - 1, True)


def test_noise_with_a_seed_cannot_be_asked_for(live):
    assert ENGINES["dp"] is DpEngine
    assert {field.name for field in fields(DpEngine)} == {"noise_multiplier", "clip"}
    job = TrainJob(live.spec.layout.roles, 0)
    assert type(DpEngine(1.0).begin(live, TASK, SGD, job).source) is SecureNoise
    assert build(ENGINES, {"kind": "dp", "noise_multiplier": 0.8}, "engine") == DpEngine(0.8)
    for wrong in ({"noise_multiplier": 1.0, "seed": 1}, {"noise_multiplier": 0.0}, {"noise_multiplier": 1.0, "clip": -1.0}):
        with pytest.raises(ValueError, match=r"seed|noise_multiplier|clip"):
            build(ENGINES, {"kind": "dp", **wrong}, "engine")
    for bad in (DpEngine(0.0), DpEngine(float("nan")), DpEngine(1.0, 0.0)):
        with pytest.raises(PrivacyError, match="must be finite and above 0"):
            bad.begin(live, TASK, SGD, job)
    with pytest.raises(PrivacyError, match="too much for"):
        DpEngine(1e9).begin(live, TASK, SGD, job)


def test_no_rows_are_refused(live):
    with pytest.raises(DataError, match="no example to train on"):
        train(live, TASK, rows(0), SGD, TrainJob(live.spec.layout.roles, 0), DpEngine(1.0))


def test_checkpointed_activations_give_the_same_sum(live):
    (batch,) = batches_of(TASK, rows(4), np.arange(4), 4)
    found = []
    for wanted in (False, True):
        place(live)
        settings = replace(SGD, checkpoint_activations=wanted)
        with training(live.model, settings):
            private(live, settings, source=Seeded(scale=0.0)).step(0, [batch])
        found.append(live.flat.clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-7, rtol=0)


def test_evaluation_between_steps_is_untouched(live):
    (batch,) = batches_of(TASK, rows(3), np.arange(3), 3)
    with evaluating(live.model):
        before = float(TASK.loss(live.model, batch).total.detach())
        private(live).windows(rows(5))
        assert float(TASK.loss(live.model, batch).total.detach()) == before
