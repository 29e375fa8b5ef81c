"""Loss scaling: exact where nothing overflows, a step left out where something does, and the same bits after a resumption."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log2

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.training import TrainJob, TrainSettings, scaling, train
from fedpeft.training.scaling import Scaler, half_of, of_sum

BOTH = frozenset({"A", "B"})
PLAIN = TrainSettings(steps=7, batch_size=4, accumulate=2, lr=0.05, clip=0.5)
FP16 = replace(PLAIN, precision="fp16")


class Through(torch.autograd.Function):
    """The identity, whose gradient is made another."""

    @staticmethod
    def forward(ctx, value, change):
        ctx.change = change
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def fp16(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.half().float()


@dataclass(frozen=True)
class Changed:
    """A toy task whose gradients are ``change``d in the steps ``which`` (all), or whose windows of the steps ``without`` are left out."""

    inner: object
    change: object = None
    which: tuple[int, ...] | None = None
    without: tuple[int, ...] = ()
    weight: float = 1.0
    per_step: int = 2
    calls: tuple[list[int], ...] = ([],)
    name: str = "toy"

    def batches(self, data, size, seed, epoch) -> Iterator[object]:
        assert epoch == 0
        for place, batch in enumerate(self.inner.batches(data, size, seed, epoch)):
            if place // self.per_step not in self.without:
                yield batch

    def loss(self, model, batch):
        found = self.inner.loss(model, batch)
        step = len(self.calls[0]) // self.per_step
        self.calls[0].append(step)
        found.total = found.total * self.weight
        if self.change is not None and (self.which is None or step in self.which):
            found.total = Through.apply(found.total, self.change)
        return found


def changed(toy_task, *arguments, **settings) -> Changed:
    return Changed(toy_task(), *arguments, **settings, calls=([],))


@pytest.fixture
def data() -> torch.Tensor:
    return torch.randn(80, 2, 5, generator=torch.Generator().manual_seed(1))


def still(live):
    """Without dropout, whose mask depends on a step's number."""
    for module in live.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return live


def fit(live, task, data, settings, folder=None, progress=None):
    return train(live, task, data, settings, TrainJob(BOTH, 1, folder, progress, want_gradient=True))


@given(st.integers(-3, 30), st.integers(1, 10**7))
def test_the_scale_of_a_sum_is_a_power_of_two_near_that_of_its_mean(power, terms):
    found = of_sum(2.0**power, terms)
    assert log2(found).is_integer()
    assert found <= 2.0**power / terms < 2 * found


@pytest.mark.parametrize("change", [{}, {"optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.1}, {"proximal": 0.3, "clip": 0.0}])
def test_where_nothing_overflows_a_scaled_job_is_the_job(toy_live, toy_task, data, change):
    plain, scaled = toy_live(), toy_live()
    wanted = fit(plain, toy_task(), data, replace(PLAIN, **change))
    found = fit(scaled, toy_task(), data, replace(FP16, **change))
    assert torch.equal(plain.flat, scaled.flat)
    assert (found.gradient == wanted.gradient).all()
    assert (found.loss_sum, found.skipped) == (wanted.loss_sum, 0)


def test_a_step_that_overflows_is_as_if_its_rows_had_not_been_there(toy_live, toy_task, data):
    left, skipped = still(toy_live()), still(toy_live())
    wanted = fit(left, changed(toy_task, without=(2, 5)), data, replace(PLAIN, steps=5))
    found = fit(skipped, changed(toy_task, lambda g: g * torch.inf, (2, 5)), data, FP16)
    assert torch.equal(left.flat, skipped.flat)
    assert (found.skipped, found.steps) == (2, 7)
    assert (found.gradient == wanted.gradient).all()


def test_gradients_too_small_for_fp16_survive_it(toy_live, toy_task, data):
    """A loss of a billionth: through fp16 its gradient is 0, scaled it is not."""
    moved = {}
    for precision, change in (("fp32", None), ("fp32", fp16), ("fp16", fp16)):
        live = toy_live()
        start = live.flat.clone()
        task = changed(toy_task, (lambda g: fp16(g * 1e-9) * 1e9) if change else None)
        fit(live, task, data, replace(PLAIN, precision=precision))
        moved[precision, change] = live.flat - start
    assert not moved["fp32", fp16].any()
    assert float((moved["fp16", fp16] - moved["fp32", None]).norm() / moved["fp32", None].norm()) < 0.02


def test_the_scale_falls_until_gradients_fit_and_rises_again(toy_live, toy_task, data, monkeypatch):
    monkeypatch.setattr(scaling, "WINDOW", 3)
    seen: list[float] = []
    task = changed(toy_task, lambda g: seen.append(float(g)) or fp16(g * 64.0) / 64.0)
    found = fit(toy_live(), task, data, replace(FP16, steps=9))
    assert [log2(size) for size in seen[::2]] == [13, 12, 11, 10, 9, 9, 9, 10, 9]  # of 8 terms: an eighth of the mean's
    assert found.skipped == 5


@pytest.mark.parametrize("stop", [3, 5])
def test_a_job_killed_after_skipped_steps_goes_on_at_the_same_bits(toy_live, toy_task, data, tmp_path, monkeypatch, stop):
    class Killed(Exception):
        pass

    def killed(step, _loss):
        if step == stop:
            raise Killed

    monkeypatch.setattr(scaling, "WINDOW", 2)

    def overflowing():
        return changed(toy_task, lambda g: torch.where(g > 2.0**12, torch.inf, g))

    settings = replace(FP16, save_every=1)
    whole, again = toy_live(), toy_live()
    wanted = fit(whole, overflowing(), data, settings)
    assert 0 < wanted.skipped < 7
    with pytest.raises(Killed):
        fit(toy_live(), overflowing(), data, settings, tmp_path, killed)
    found = fit(again, overflowing(), data, settings, tmp_path)
    assert (found.resumed_from, found.skipped) == (stop - 1, wanted.skipped)
    assert torch.equal(again.flat, whole.flat)


def test_gradients_that_no_scale_makes_finite_end_the_job(toy_live, toy_task, data, monkeypatch):
    monkeypatch.setattr(scaling, "START", 4.0)
    live = toy_live()
    start = live.flat.clone()
    with pytest.raises(UpdateError, match=r"step 3 has gradients that are not finite at loss scale 1, .*precision = 'bf16'") as fault:
        fit(live, changed(toy_task, lambda g: g * torch.nan), data, FP16)
    assert fault.value.exit_code == 11
    assert torch.equal(live.flat, start)


def test_a_job_that_did_no_step_says_so(toy_live, toy_task, data):
    with pytest.raises(UpdateError, match="all 2 steps were skipped"):
        fit(toy_live(), changed(toy_task, lambda g: g * torch.inf), data, replace(FP16, steps=2))


def test_a_loss_that_is_not_finite_is_no_matter_of_scale(toy_live, toy_task, data):
    with pytest.raises(UpdateError, match="step 1 of 7 has loss nan"):
        fit(toy_live(), changed(toy_task, weight=float("nan")), data, FP16)


def test_a_base_in_fp16_is_scaled_whatever_the_precision(toy_live):
    model, cpu = toy_live().model, torch.device("cpu")
    assert not scaling.scaled(PLAIN, model, cpu)
    assert scaling.scaled(FP16, model, cpu)
    model[0].base_layer.half()
    assert scaling.scaled(PLAIN, model, cpu)


@pytest.mark.parametrize(("capability", "bf16"), [((7, 5), torch.float16), ((9, 0), torch.bfloat16)])
def test_a_card_takes_the_half_precision_that_it_has(monkeypatch, capability, bf16):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda:0")
    found = [half_of(replace(PLAIN, precision=precision), cuda) for precision in ("fp32", "bf16", "fp16")]
    assert found == [None, bf16, torch.float16]
    assert half_of(FP16, torch.device("cpu")) is None


def test_a_scaler_without_a_state_to_restore_begins_anew():
    scaler = Scaler()
    scaler.restore({})
    assert scaler.scale == scaling.START
