"""The loop on real bases: a sentence encoder that learns a class, a causal model that learns slots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.methods import Lora
from fedpeft.tasks import Classification, Generation, Source, read_rows
from fedpeft.training import TrainJob, TrainSettings, engine, evaluate, scaling, train

LABELS = ("card_arrival", "exchange_rate", "lost_or_stolen_card")
INTENTS = Classification("intents", LABELS)
SLOTS = Generation("slots", metrics=("perplexity",))


@pytest.fixture(scope="module")
def encoder():
    return load_base(BaseSpec("minilm", max_tokens=64), "cpu")


@pytest.fixture(scope="module")
def intents(encoder, shared_data):
    source = Source(path=str(shared_data / "banking77.jsonl"), where={"label": list(LABELS)}, limit=150)
    return {split: INTENTS.encode(read_rows(source, split), encoder) for split in ("train", "test")}


@pytest.fixture(scope="module")
def slots(causal, shared_data):
    source = Source(path=str(shared_data / "snips_slots.jsonl"), where={"client": "RateBook"}, limit=60)
    return {split: SLOTS.encode(read_rows(source, split), causal) for split in ("train", "test")}


def fit(base, task, data, settings, job=None, method=None):
    """Train from the seed's adapter: the result and the values."""
    spec = make_spec(task.name, base, method or Lora(), task.head)
    with attach(base, spec) as live:
        live.load(initial(base, spec, 0).tensors)
        return train(live, task, data["train"], settings, job or TrainJob(spec.layout.roles, 0)), live.read()


def learn(base, task, data, settings, method):
    """As `fit`: the result, and the scores of held-out rows before and after."""
    spec = make_spec(task.name, base, method, task.head)
    with attach(base, spec) as live:
        live.load(initial(base, spec, 0).tensors)
        before = task.scores(evaluate(live, task, data["test"]))
        result = train(live, task, data["train"], settings, TrainJob(spec.layout.roles, 0))
        return result, before, task.scores(evaluate(live, task, data["test"]))


@pytest.mark.slow
def test_the_encoder_learns_intents(encoder, intents):
    settings = TrainSettings(steps=25, batch_size=16, lr=2e-3, lr_by_role={"head": 1e-2}, warmup=3, schedule="linear")
    result, before, after = learn(encoder, INTENTS, intents, settings, Lora(dropout=0.05))
    assert before["accuracy"] < 0.7
    assert after["accuracy"] > 0.9
    assert result.examples == result.count
    assert result.tokens > result.examples


def test_the_causal_model_learns_slots(causal, slots):
    settings = TrainSettings(steps=6, batch_size=4, lr=1e-2, accumulate=2)
    _, before, after = learn(causal, SLOTS, slots, settings, Lora(targets=("all",)))
    assert after["perplexity"] < before["perplexity"] / 4


def test_one_role_trains_and_the_trunk_stays(causal, slots):
    spec = make_spec("slots", causal, Lora(), SLOTS.head)
    weights = {name: value.clone() for name, value in causal.model.state_dict().items()}
    start = initial(causal, spec, 0).tensors
    with attach(causal, spec) as live:
        live.load(start)
        train(live, SLOTS, slots["train"], TrainSettings(steps=1, batch_size=4), TrainJob(frozenset("B"), 0))
        end = live.read()
    assert (end.pick("A").flat == start.pick("A").flat).all()
    assert (end.pick("B").flat != start.pick("B").flat).mean() > 0.9
    assert all(torch.equal(value, weights[name]) for name, value in causal.model.state_dict().items())
    assert not causal.model.training


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_resumed_real_job_has_the_same_bits(tmp_path, causal, slots, dropout):
    settings = TrainSettings(steps=4, batch_size=4, save_every=2, lr=1e-2)
    roles = frozenset({"A", "B"})
    _, whole = fit(causal, SLOTS, slots, settings, TrainJob(roles, 7), Lora(dropout=dropout))

    def stop(step, _loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(causal, SLOTS, slots, settings, TrainJob(roles, 7, tmp_path, stop), Lora(dropout=dropout))
    result, resumed = fit(causal, SLOTS, slots, settings, TrainJob(roles, 7, tmp_path), Lora(dropout=dropout))
    assert result.resumed_from == 2
    assert resumed.digest == whole.digest


def test_accumulated_windows_equal_one_large_batch(causal, slots):
    one = TrainSettings(steps=2, batch_size=8, lr=1e-2)
    _, large = fit(causal, SLOTS, slots, one)
    _, small = fit(causal, SLOTS, slots, replace(one, batch_size=4, accumulate=2))
    assert float(abs((large - small).flat).max()) < 2e-4
    assert (large - small).norm() < 1e-3 * large.norm()


@pytest.mark.parametrize("family", ["encoder", "causal"])
def test_checkpointed_activations_change_nothing(request, family):
    base = request.getfixturevalue(family)
    task, data = {"encoder": (INTENTS, "intents"), "causal": (SLOTS, "slots")}[family]
    data = request.getfixturevalue(data)
    settings = TrainSettings(steps=2, batch_size=2)
    _, plain = fit(base, task, data, settings, method=Lora(dropout=0.1))
    calls = count_recomputes()
    with calls as seen:
        _, saved = fit(base, task, data, replace(settings, checkpoint_activations=True, offload_activations=True), method=Lora(dropout=0.1))
    assert seen
    assert float(abs((plain - saved).flat).max()) < 1e-6
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.model.modules())


class count_recomputes:
    """Counts calls of torch's checkpoint function; a switch that does nothing would pass every other assertion."""

    def __enter__(self):
        import fedpeft.training.offload as home

        self.home, self.original, self.seen = home, home.checkpoint, []
        home.checkpoint = self._counted
        return self.seen

    def __exit__(self, *_):
        self.home.checkpoint = self.original

    def _counted(self, *arguments, **settings):
        self.seen.append(settings.get("use_reentrant"))
        return self.original(*arguments, **settings)


def test_bf16_falls_back_to_fp32_on_a_cpu(causal, slots):
    settings = TrainSettings(steps=2, batch_size=2)
    _, full = fit(causal, SLOTS, slots, settings)
    _, half = fit(causal, SLOTS, slots, replace(settings, precision="bf16"))
    assert full.digest == half.digest


@pytest.fixture
def half(monkeypatch):
    """fp16 arithmetic, which a CPU never chooses: slow, but it overflows and rounds where a GPU's does."""
    monkeypatch.setattr(engine, "half_of", lambda settings, device: torch.float16 if settings.precision == "fp16" else None)
    return replace(TrainSettings(steps=8, batch_size=4, lr=5e-3), precision="fp16")


def test_fp16_arithmetic_trains_nearly_as_fp32_does(causal, slots, half):
    half = replace(half, steps=3, batch_size=2)
    full, wanted = fit(causal, SLOTS, slots, replace(half, precision="fp32"))
    result, found = fit(causal, SLOTS, slots, half)
    start = initial(causal, make_spec(SLOTS.name, causal, Lora(), SLOTS.head), 0).tensors
    assert result.skipped == 0
    assert result.loss == pytest.approx(full.loss, rel=5e-3)
    assert np.linalg.norm(found.flat - wanted.flat) < 0.1 * np.linalg.norm(wanted.flat - start.flat)


@pytest.mark.slow
def test_fp16_arithmetic_leaves_out_steps_until_its_gradients_fit(causal, slots, half, monkeypatch):
    monkeypatch.setattr(scaling, "START", 2.0**23)
    result, found = fit(causal, SLOTS, slots, half)
    assert 1 < result.skipped < half.steps
    assert found.finite
