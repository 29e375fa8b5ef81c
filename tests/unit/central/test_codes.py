"""Moments in codes: there and back to the bit on the same parts, near enough on others; what a rank holds is what bitsandbytes does."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.central.codes import BLOCK, BOOKS, PARTS, SCALES, coded, decoded, gathered_scales, narrowed, scales_of, widened
from fedpeft.training.engine import optimizer_of
from fedpeft.training.settings import TrainSettings

KINDS = {name: functional.create_dynamic_map(signed=name == "exp_avg") for name in BOOKS}
BYTES = TrainSettings(optimizer="adamw8bit", lr=0.01)


def drawn(size: int, seed: int, spread: float, signed: bool) -> torch.Tensor:
    """Values over ``spread`` powers of ten, a few of them 0."""
    dice = np.random.default_rng(seed)
    values = 10.0 ** dice.uniform(-spread, 0, size) * dice.choice([1, -1] if signed else [1], size) * (dice.random(size) > 0.05)
    return torch.from_numpy(values.astype(np.float32))


def nearest(values: np.ndarray, book: np.ndarray) -> np.ndarray:
    """The value of the nearest entry under each block's largest, float64, value by value."""
    found = np.empty(len(values))
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        largest = np.abs(block).max() or 1.0
        found[start : start + BLOCK] = [book[np.argmin(np.abs(book - value / largest))] * largest for value in block]
    return found


SIZES, SEEDS, SPREADS = st.integers(1, 3 * BLOCK + 7), st.integers(0, 1 << 20), st.floats(0.0, 8.0)


@settings(max_examples=25)
@given(SIZES, SEEDS, SPREADS, st.sampled_from(sorted(KINDS)))
def test_codes_are_the_nearest_and_go_there_and_back_to_the_bit(size, seed, spread, moment):
    book, values = KINDS[moment], drawn(size, seed, spread, moment == "exp_avg")
    codes, scales = coded(values, book)
    found = decoded(codes, book, scales)
    np.testing.assert_allclose(found, nearest(values.double().numpy(), book.double().numpy()), rtol=1e-6, atol=1e-12)
    again, kept = coded(found, book, scales)
    assert torch.equal(kept, scales)
    assert torch.equal(decoded(again, book, kept), found)
    live = scales.repeat_interleave(BLOCK)[:size] > 0
    assert torch.equal(again[live], codes[live])


@settings(max_examples=25)
@given(SIZES, SEEDS, SPREADS, st.sampled_from(sorted(KINDS)), st.integers(1, BLOCK - 1))
def test_other_blocks_round_by_half_of_two_codes_distance_at_most(size, seed, spread, moment, shift):
    book, values = KINDS[moment], drawn(size, seed, spread, moment == "exp_avg")
    first = decoded(*[(pair := coded(values, book))[0], book, pair[1]])
    rest = first[min(shift, size - 1) :]  # as on a rank whose part begins elsewhere
    wrong = torch.ones(-(-len(rest) // BLOCK))
    codes, scales = coded(rest, book, wrong)
    off = (decoded(codes, book, scales) - rest).abs()
    largest = scales.repeat_interleave(BLOCK)[: len(rest)]
    gap = float((book[1:] - book[:-1]).max()) / 2 + 0.008  # the first book ends at -0.993
    assert bool((off <= gap * largest * (1 + 1e-5)).all())
    near = rest.abs() >= largest / 10
    assert bool((off <= 0.06 * rest.abs() + 1e-12)[near].all())


def trained(steps: int, size: int = 6000, seed: int = 0):
    """bitsandbytes' own optimizer after some steps: on a large tensor, in codes, and a small one, in float32."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(count, generator=generator)) for count in (size, 100)]
    optimizer = optimizer_of([{"params": params, "lr": 0.01}], BYTES)
    for _ in range(steps):
        step(optimizer, params, generator)
    return optimizer, params, generator


def step(optimizer, params, generator) -> None:
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * torch.arange(len(param)).remainder(97).float().exp2().rsqrt()
    optimizer.step()


def handed_on(optimizer, params, steps, rank=0, ranks=1):
    """A new optimizer from what a checkpoint holds of ``optimizer``."""
    arrays = gathered_scales(optimizer, params, 1)
    with widened(optimizer):
        values = {param: {moment: optimizer.state[param][moment].clone() for moment in PARTS} for param in params}
    fresh = optimizer_of([{"params": params, "lr": 0.01}], BYTES)
    for param, held in values.items():
        fresh.state[param] = held | {"step": torch.tensor(float(steps))}
    narrowed(fresh, params, steps, scales_of(arrays, rank, ranks))
    return fresh


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_optimizer_goes_on_at_the_same_bits_on_the_same_parts_and_nearby_on_others(ranks):
    """With two ranks the scales in the checkpoint, of one, are of no use; blocks are the same here, and so all but equal."""
    optimizer, params, generator = trained(5)
    before = [param.detach().clone() for param in params]
    fresh = handed_on(optimizer, params, 5, ranks=ranks)
    state = generator.get_state()
    step(optimizer, params, generator)
    wanted = [param.detach().clone() for param in params]
    for param, value in zip(params, before, strict=True):
        param.data.copy_(value)
    generator.set_state(state)
    step(fresh, params, generator)
    for param, one, start in zip(params, wanted, before, strict=True):
        if ranks == 1:
            assert torch.equal(param, one)
        assert float((param.detach() - one).norm()) <= 0.02 * float((one - start).norm())


def test_moments_are_values_only_while_somebody_looks_and_a_byte_each_after_it():
    optimizer, (large, small), _ = trained(2)
    held = dict(optimizer.state[large])
    with widened(optimizer):
        assert optimizer.state[large]["exp_avg"].dtype == torch.float32
        assert optimizer.state[small]["exp_avg"] is optimizer.state[small]["state1"]
    assert optimizer.state[large].keys() == held.keys()
    fresh = handed_on(optimizer, [large, small], 2)
    assert {name: value.dtype for name, value in fresh.state[large].items() if isinstance(value, torch.Tensor)} == {
        name: value.dtype for name, value in held.items() if isinstance(value, torch.Tensor)
    }
    assert fresh.state[small]["state1"].dtype == torch.float32
    assert isinstance(fresh, AdamW8bit)


def test_scales_are_for_as_many_ranks_as_wrote_them_and_plain_moments_have_none():
    arrays = {SCALES: np.arange(6, dtype=np.float32).reshape(2, 3)}
    assert scales_of(arrays, 1, 2).tolist() == [3.0, 4.0, 5.0]
    assert scales_of(arrays, 0, 1) is None
    assert scales_of({}, 0, 2) is None
    assert gathered_scales(SimpleNamespace(state={}), [torch.ones(2)], 1) == {}
