"""Codecs: bounds, unbiased rounding, error feedback, budgets, and messages that nobody should have sent."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.wire.codecs import (
    BF16,
    NF4,
    Int2,
    Int3,
    Int4,
    Int8,
    OneBit,
    TopK,
    hear,
    receive,
    rounding,
    scales,
    send,
    tell,
)
from fedpeft.wire.codecs.nf4 import LEVELS

DELTAS = [BF16(), Int8(), Int4(16), Int3(8), Int2(8), NF4(32), OneBit(8), TopK(0.2)]
ROUNDING = [BF16(), Int8(16), Int4(16), Int3(16), Int2(8), NF4(16)]
by_name = pytest.mark.parametrize("codec", DELTAS, ids=lambda codec: codec.kind)
few = settings(max_examples=15)
seeds = st.one_of(st.none(), st.integers(0, 2**64))


def vector(size: int, seed: int, spread: float = 3.0) -> np.ndarray:
    """Heavy-tailed values of very different sizes, with zeros and a block of zeros."""
    rng = np.random.default_rng(seed)
    flat = rng.standard_t(3, size) * 10.0 ** rng.uniform(-spread, spread, size)
    flat[rng.random(size) < 0.1] = 0.0
    flat[size // 2 : size // 2 + 20] = 0.0
    return flat.astype(np.float32)


def layout_of(size: int) -> Layout:
    return Layout.of([Entry("B", "x.lora_B.weight", (size,))])


def slow_steps(flat: np.ndarray, block: int, limit: int) -> np.ndarray:
    """The largest step that each value's block may have, in float64: its peak over ``limit``, an eighth of an octave up."""
    blocks = [flat[start : start + block].astype(np.float64) for start in range(0, flat.size, block)]
    top = max((np.abs(part).max() for part in blocks), default=0.0)
    peaks = [max(np.abs(part).max() * 2 ** (1 / 8), top * 2.0 ** (-254 / 8)) if part.any() else 0.0 for part in blocks]
    return np.repeat(np.array(peaks) / limit, [part.size for part in blocks])


@by_name
@given(size=st.integers(0, 300), seed=st.integers(0, 99), rounding_seed=seeds)
@few
def test_decode_has_the_shape_and_the_message_its_bound(codec, size, seed, rounding_seed):
    flat = vector(size, seed)
    kept = flat.copy()
    message = codec.encode(flat, rounding_seed)
    back = codec.decode(message, size)
    assert back.dtype == np.float32
    assert back.shape == (size,)
    assert np.isfinite(back).all()
    assert len(message) <= codec.most(size, 1)
    assert codec.encode(flat, rounding_seed) == message
    np.testing.assert_array_equal(flat, kept)


@pytest.mark.parametrize(("codec", "limit"), [(Int8(16), 127), (Int4(16), 7), (Int3(16), 3), (Int2(16), 1)])
@given(size=st.integers(1, 200), seed=st.integers(0, 99), rounding_seed=seeds)
@few
def test_integers_are_off_by_at_most_a_step_of_their_block(codec, limit, size, seed, rounding_seed):
    flat = vector(size, seed)
    error = np.abs(codec.decode(codec.encode(flat, rounding_seed), size).astype(np.float64) - flat)
    allowed = slow_steps(flat, 16, limit) * (0.5 if rounding_seed is None else 1.0)
    assert (error <= allowed * (1 + 1e-5)).all()


@given(size=st.integers(1, 200), seed=st.integers(0, 99))
@few
def test_nf4_takes_the_nearest_of_its_sixteen_levels(size, seed):
    flat = vector(size, seed)
    _, peaks = scales.pack(np.abs(rounding.rows_of(flat, 32)).max(axis=1))
    table = np.repeat(peaks.astype(np.float64), 32)[:size, None] * LEVELS.astype(np.float64)
    nearest = np.abs(table - flat[:, None]).min(axis=1)
    error = np.abs(NF4(32).decode(NF4(32).encode(flat, None), size).astype(np.float64) - flat)
    np.testing.assert_allclose(error, nearest, rtol=1e-5, atol=1e-6 * np.abs(flat).max())


@given(size=st.integers(1, 200), seed=st.integers(0, 99))
@few
def test_bf16_to_nearest_is_within_half_of_its_last_bit(size, seed):
    flat = vector(size, seed)
    back = BF16().decode(BF16().encode(flat, None), size)
    assert (np.abs(back - flat) <= np.abs(flat) * 2.0**-8).all()


@pytest.mark.parametrize("codec", ROUNDING, ids=lambda codec: codec.kind)
def test_rounding_is_unbiased_over_seeds(codec):
    flat, runs = vector(64, 5, spread=0.3), 300
    mean = np.mean([codec.decode(codec.encode(flat, seed), 64).astype(np.float64) for seed in range(runs)], axis=0)
    levels = {"int8": 127, "int4": 7, "int3": 3, "int2": 1, "nf4": 2}
    step = np.abs(flat) * 2.0**-7 if isinstance(codec, BF16) else slow_steps(flat, codec.block, levels[codec.kind])
    assert (np.abs(mean - flat) <= 4.5 * step / 2 / np.sqrt(runs) + 1e-12).all()


@given(size=st.integers(0, 100), seed=st.integers(0, 99))
@few
def test_onebit_sends_signs_and_block_means(size, seed):
    flat = vector(size, seed)
    back = OneBit(8).decode(OneBit(8).encode(flat, None), size)
    for start in range(0, size, 8):
        part, got = flat[start : start + 8], back[start : start + 8]
        mean, top = np.abs(part.astype(np.float64)).mean(), np.abs(back).max(initial=0.0)
        assert ((got > 0) == (part > 0))[got != 0].all()
        assert (np.abs(got) <= max(mean * 2 ** (1 / 8), float(top) * 2.0 ** (-254 / 8)) * (1 + 1e-5)).all()
        assert (np.abs(got) >= mean * (1 - 1e-5)).all()


@given(size=st.integers(1, 3000), seed=st.integers(0, 99), fraction=st.floats(1e-4, 1.0))
@few
def test_topk_keeps_the_largest_and_nothing_else(size, seed, fraction):
    codec, flat = TopK(fraction), vector(size, seed)
    kept = min(max(round(fraction * size), 1), size)
    message = codec.encode(flat, None)
    back = codec.decode(message, size)
    assert len(message) <= codec.most(size, 1)
    assert np.count_nonzero(back) <= kept
    threshold = np.sort(np.abs(flat))[size - kept]
    assert (np.abs(flat[back != 0]) >= threshold).all()
    largest = np.abs(flat) > threshold
    assert (np.abs(back - flat)[largest] <= np.abs(flat).max() / 127).all()


@by_name
@pytest.mark.parametrize("fixed", [None, 7])
@given(size=st.integers(1, 120), seed=st.integers(0, 99))
@few
def test_error_feedback_telescopes(codec, fixed, size, seed):
    layout, residual = layout_of(size), None
    heard, said, peak = np.zeros(size), np.zeros(size), 0.0
    for place in range(6):
        delta = Tensors(layout, vector(size, 100 * seed + place, spread=1.0))
        message, residual = send(codec, delta, residual, fixed)
        heard += receive(codec, message, delta).flat
        said += delta.flat
        peak = max(peak, float(np.abs(heard).max()), float(np.abs(residual.flat).max()))
    np.testing.assert_allclose(heard + residual.flat, said, atol=12 * 2.0**-23 * (peak + np.abs(said).max()))


@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 99))
@pytest.mark.parametrize("codec", DELTAS, ids=lambda codec: codec.kind)
def test_steps_down_leave_both_sides_with_the_same_bits_and_lose_nothing_for_good(codec, size, seed):
    layout = layout_of(size)
    held = theirs = wanted = Tensors(layout, vector(size, seed, spread=1.0))
    residual, peak = Tensors.zeros(layout), 0.0
    for place in range(5):
        step = Tensors(layout, vector(size, 100 * seed + place, spread=0.1))
        message, after, residual = tell(codec, held, held + step, residual)
        theirs = hear(codec, theirs, message)
        held, wanted = after, wanted + step
        assert theirs.digest == held.digest
        peak = max(peak, *(float(np.abs(one.flat).max()) for one in (held, wanted, residual)))
    np.testing.assert_allclose((held + residual).flat, wanted.flat, atol=30 * 2.0**-23 * peak)


@pytest.mark.parametrize("codec", [Int8(), Int4(), NF4(), OneBit(), TopK(0.2)], ids=lambda codec: codec.kind)
def test_what_is_lost_of_many_equal_deltas_becomes_ever_less(codec):
    delta, residual = Tensors(layout_of(500), vector(500, 3, spread=0.2)), None
    for place in range(40):
        _, residual = send(codec, delta, residual, None)
        if place == 0:
            first = residual.norm()
    assert residual.norm() / 40 < 0.35 * first


def test_a_delta_that_is_not_finite_is_refused():
    for codec in DELTAS:
        for bad in (np.nan, np.inf):
            with pytest.raises(UpdateError, match="finite"):
                codec.encode(np.array([0.0, bad, 1.0], np.float32), None)


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e30, 3e38])
def test_the_ends_of_float32_come_back_finite(scale):
    flat = np.array([1.0, -1.0, 0.5, 0.0, 1e-3] * 8, np.float32) * np.float32(scale)
    for codec in DELTAS:
        for seed in (None, 3):
            back = codec.decode(codec.encode(flat, seed), flat.size)
            assert np.isfinite(back).all()
            assert np.abs(back).max() <= 1.1 * np.abs(flat).max()


@by_name
@given(data=st.binary(max_size=200), size=st.integers(0, 400))
@few
def test_garbage_is_refused_or_decoded_never_crashed_on(codec, data, size):
    with contextlib.suppress(UpdateError):
        back = codec.decode(data, size)
        assert back.shape == (size,)
        assert np.isfinite(back).all()


@by_name
@given(size=st.integers(1, 300), choice=st.data())
@few
def test_damaged_messages_are_refused_or_decoded_never_crashed_on(codec, size, choice):
    message = bytearray(codec.encode(vector(size, 1), None))
    for _ in range(choice.draw(st.integers(1, 4))):
        message[choice.draw(st.integers(0, len(message) - 1))] = choice.draw(st.integers(0, 255))
    cut = message[: choice.draw(st.integers(0, len(message)))]
    for damaged in (message, cut):
        with contextlib.suppress(UpdateError):
            back = codec.decode(bytes(damaged), size)
            assert back.shape == (size,)
            assert np.isfinite(back).all()


@by_name
@given(size=st.integers(1, 300), other=st.integers(0, 300))
@few
def test_messages_of_another_size_or_length_are_refused(codec, size, other):
    message = codec.encode(vector(size, 1), None)
    with pytest.raises(UpdateError):
        codec.decode(message + b"\0", size)
    with pytest.raises(UpdateError):
        codec.decode(message[:-1], size)
    if codec.most(other, 1) < len(message):
        with pytest.raises(UpdateError):
            codec.decode(message, other)
