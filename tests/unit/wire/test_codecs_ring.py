"""Narrow rings: integers of public scales, their exact sums, their packing, and masks that commute with it."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import PrivacyError, UpdateError
from fedpeft.privacy.packing import Schema
from fedpeft.privacy.secagg.masks import KEY_SIZE, apply_masks
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Grid, Update
from fedpeft.wire.codecs import CODECS, Int8, Lanes, Plain, Ring, as_ring
from fedpeft.wire.codecs.ring import pack, packed_size, settle, unpack
from fedpeft.wire.vector import Vector

few = settings(max_examples=20)
rings = st.builds(Ring, st.integers(2, 16), st.sampled_from([8, 16, 64]), st.floats(0.5, 8))


def layout_of(size: int) -> Layout:
    return Layout.of([Entry("B", "x.lora_B.weight", (size,))])


def lanes_of(size: int, ring: Ring, shifts: np.ndarray, grid: Grid) -> Lanes:
    return Lanes.told(layout_of(size), {"B"}, ring, shifts.tobytes(), grid)


def delta_of(size: int, seed: int, scale: float = 1e-3) -> Tensors:
    rng = np.random.default_rng(seed)
    return Tensors(layout_of(size), (rng.standard_normal(size) * scale * 10 ** rng.uniform(-1, 1, size)).clip(-1, 1).astype(np.float32))


@given(width=st.integers(1, 32), size=st.integers(0, 100), seed=st.integers(0, 99))
@few
def test_packing_keeps_the_low_bits(width, size, seed):
    codes = np.random.default_rng(seed).integers(-(2**31), 2**31, size).astype(np.int32)
    data = pack(codes, width)
    assert len(data) == packed_size(size, width)
    kept = unpack(data, width, size)
    assert kept.dtype == np.int32
    assert [int(value) & (1 << width) - 1 for value in codes] == [int(value) & 0xFFFFFFFF for value in kept]
    if size:
        with pytest.raises(UpdateError, match="bits take"):
            unpack(data + b"\0", width, size)


@given(ring=rings, sites=st.integers(1, 12), size=st.integers(1, 80), seed=st.integers(0, 99), mixing=st.permutations(range(12)))
@few
def test_masked_sums_of_narrow_integers_are_exact_in_any_order(ring, sites, size, seed, mixing):
    grid, rng = Grid(sites), np.random.default_rng(seed)
    shifts = ring.shifts(delta_of(size, seed).flat, grid)
    width = ring.width(sites)
    whole = [ring.narrow(Update.encode(delta_of(size, seed + 1 + site), 1.0, {}, grid).codes, shifts, seed) for site in range(sites)]
    exact = [sum(int(codes[place]) for codes in whole) for place in range(size)]
    masks = rng.integers(-(2**31), 2**31, (sites, size)).astype(np.int32)
    masks[-1] = -masks[:-1].sum(axis=0, dtype=np.int32)
    sent = [pack(codes + mask, width) for codes, mask in zip(whole, masks, strict=True)]
    total = np.zeros(size, np.int32)
    for data in (sent[place] for place in mixing if place < sites):
        total += unpack(data, width, size)
    assert settle(total, width).tolist() == exact


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("sites", [1, 2, 3, 128, 1000])
def test_the_width_holds_the_extremes_and_fewer_bits_would_not(bits, sites):
    ring = Ring(bits)
    width, most = ring.width(sites), sites * ring.limit
    extremes = np.array([most, -most], np.int32)
    assert settle(extremes, width).tolist() == [most, -most]
    if sites >= 3:
        assert settle(extremes, width - 2).tolist() != [most, -most]


@given(ring=rings, sites=st.integers(1, 1000), seed=st.integers(0, 99), scale=st.sampled_from([1e-9, 1e-4, 0.1, 5.0]))
@few
def test_sums_shifted_back_never_leave_32_bits(ring, sites, seed, scale):
    grid = Grid(sites)
    shifts = ring.shifts(delta_of(100, seed, scale).flat, grid)
    extreme = np.full(100, sites * ring.limit, np.int64) if grid.limit >= ring.limit else np.zeros(100, np.int64)
    assert (extreme << np.repeat(shifts, ring.block)[:100].astype(np.int64) <= 2**30).all()
    assert (ring.widen(extreme.astype(np.int32), shifts) == extreme << np.repeat(shifts, ring.block)[:100]).all()


@given(ring=rings, size=st.integers(1, 100), seed=st.integers(0, 99), rounding=st.one_of(st.none(), st.integers(0, 99)))
@few
def test_narrowing_is_off_by_at_most_a_step_unless_cut(ring, size, seed, rounding):
    codes = np.random.default_rng(seed).integers(-(2**24), 2**24, size).astype(np.int32)
    shifts = np.full(-(-size // ring.block), 12, np.uint8)
    narrow = ring.narrow(codes, shifts, rounding)
    assert np.abs(narrow).max() <= ring.limit
    inside = np.abs(codes) <= ring.limit << 12
    error = np.abs(ring.widen(narrow, shifts).astype(np.int64) - codes)
    assert (error[inside] <= (1 << 11 if rounding is None else (1 << 12) - 1)).all()
    assert (np.abs(narrow)[~inside] == ring.limit).all()


def test_narrowing_is_unbiased_over_seeds():
    ring, shifts, codes = Ring(8, 8), np.array([10], np.uint8), np.array([0, 1, 511, 512, 1023, -1, -700, 5000], np.int32)
    mean = np.mean([ring.widen(ring.narrow(codes, shifts, seed), shifts) for seed in range(1000)], axis=0)
    assert (np.abs(mean - codes) <= 5 * 512 / np.sqrt(1000)).all()


@given(size=st.integers(1, 100), seed=st.integers(0, 99), bits=st.integers(3, 10), weight=st.floats(0.05, 1.0))
@few
def test_error_feedback_telescopes_on_weighted_codes(size, seed, bits, weight):
    """Of the deltas as the 32-bit grid holds them: what is cut or rounded away comes back later."""
    ring, grid = Ring(bits, 16), Grid(4)
    shifts = ring.shifts(delta_of(size, seed).flat, grid)
    residual, heard, said = Tensors.zeros(layout_of(size)), np.zeros(size), np.zeros(size)
    for place in range(5):
        delta = delta_of(size, seed * 10 + place)
        update = Update.encode(delta + residual, weight, {}, grid)
        sent, residual = lanes_of(size, ring, shifts, grid).send(update, None)
        assert (sent.codes == ring.widen(ring.narrow(update.codes, shifts, None), shifts)).all()
        heard += sent.codes * (grid.step / sent.weight)
        said += delta.flat
    np.testing.assert_allclose(heard + residual.flat, said, atol=5 * grid.step / weight + 1e-5)


def test_narrow_updates_add_as_any_other():
    ring, grid = Ring(4, 16), Grid(3)
    shifts = ring.shifts(delta_of(50, 0).flat, grid)
    lanes = lanes_of(50, ring, shifts, grid)
    updates = [lanes.send(Update.encode(delta_of(50, seed), 0.5, {"n": (1.0,)}, grid), seed)[0] for seed in range(3)]
    total = updates[0] + updates[1] + updates[2]
    narrow = sum(ring.narrow(update.codes, shifts, None).astype(np.int64) for update in updates)
    assert (ring.widen(narrow.astype(np.int32), shifts) == total.codes).all()
    assert total.counters == {"n": (3.0,)}


@given(seed=st.integers(0, 99))
@few
def test_scales_reach_headroom_times_the_last_mean(seed):
    ring, grid, mean = Ring(8, 16, 4.0), Grid(8), delta_of(200, seed).flat
    shifts = ring.shifts(mean, grid)
    for place, shift in enumerate(shifts):
        peak = float(np.abs(mean[16 * place : 16 * place + 16]).max())
        reach = ring.limit * 2.0 ** int(shift) * grid.step
        assert reach >= 4.0 * peak * (1 - 1e-6)


def test_scales_of_another_shape_are_refused():
    ring, codes = Ring(8, 16), np.zeros(50, np.int32)
    for bad in (np.zeros(3, np.uint8), np.zeros(4, np.int32), np.full(4, 40, np.uint8)):
        with pytest.raises(UpdateError, match="need uint8"):
            ring.narrow(codes, bad, None)


def test_a_mean_that_is_zero_or_not_finite():
    ring, grid = Ring(8, 16), Grid(2)
    assert ring.shifts(np.zeros(40, np.float32), grid).tolist() == [0, 0, 0]
    with pytest.raises(UpdateError, match="finite"):
        ring.shifts(np.array([np.nan], np.float32), grid)


def test_bytes_of_the_ring():
    assert Ring(4).width(128) == 11
    assert Ring(4).most(1_000_000, 128) == 1_375_000
    assert Plain().width(5) == 32
    assert Plain().most(10, 5) == 40


def mixed(size: int) -> Layout:
    """Roles of the ring on both sides of one that stays wide."""
    return Layout.of([Entry("A", "x.lora_A", (size,)), Entry("mass", "mass/1", (3,)), Entry("z", "x.z", (2, 5))])


def ranged(layout: Layout, seed: int) -> Tensors:
    return Tensors(layout, np.random.default_rng(seed).uniform(-1, 1, layout.size).astype(np.float32))


@given(sites=st.integers(2, 6), size=st.integers(1, 60), seed=st.integers(0, 99), bits=st.integers(2, 12))
@few
def test_whole_vectors_under_keystreams_give_the_plain_sum_of_narrow_updates(sites, size, seed, bits):
    """Masses, weight and counters keep 32 bits beside narrow values, as in a masked round; pairs of keystreams cancel."""
    ring, grid, layout = Ring(bits, 16), Grid(sites), mixed(size)
    shifts = ring.shifts(ranged(layout.subset("Az"), seed).flat, grid)
    vector = Vector(Schema(layout, grid, {"loss": 2}), Lanes.told(layout, "Az", ring, shifts.tobytes(), grid))
    whole = [Update.encode(ranged(layout, seed + 1 + site), 0.5, {"loss": (-1.5, 2.0**31)}, grid) for site in range(sites)]
    updates = [vector.lanes.send(update, site)[0] for site, update in enumerate(whole)]
    plain, total = Update.zero(layout, grid), np.zeros(vector.schema.size, np.int32)
    for site, update in enumerate(updates):
        plain = plain + update
        codes = vector.pack(update)
        ahead, behind = site.to_bytes(KEY_SIZE, "big"), ((site - 1) % sites).to_bytes(KEY_SIZE, "big")
        apply_masks(codes, [ahead], [behind])
        sent = vector.write(codes)
        assert sent.nbytes == packed_size(size + 10, ring.width(sites)) + 4 * (vector.schema.size - size - 10) == vector.lanes.bytes(9)
        total += vector.read(sent)
    summed = vector.open(total, sites)
    assert (summed.codes == plain.codes).all()
    assert (summed.weight, summed.counters) == (plain.weight, plain.counters)
    assert (plain.codes[size : size + 3] == sum(update.codes[size : size + 3].astype(np.int64) for update in whole)).all()
    for bad in (sent[:-1], sent.astype(np.int32)):
        with pytest.raises(UpdateError, match="bytes were expected"):
            vector.read(bad)


def test_a_sum_that_so_few_sites_cannot_have_sent_is_refused():
    grid, layout = Grid(4), layout_of(3)
    lanes = Lanes.told(layout, {"B"}, Ring(4, 16), b"\2", grid)
    vector = Vector(Schema(layout, grid, {}), lanes)
    total = np.array([15, 0, 0, 1 << 20], np.int32)
    with pytest.raises(PrivacyError, match="holds 15, each may send 7"):
        vector.open(total, 2)
    assert vector.open(total, 3).codes.tolist() == [60, 0, 0]


@given(sites=st.integers(1, 100), bits=st.integers(12, 31), size=st.integers(1, 40), seed=st.integers(0, 99))
@few
def test_codes_of_a_narrow_grid_travel_in_its_bits(sites, bits, size, seed):
    """As under noise, where all values have one step."""
    grid, layout = Grid(sites, 1.0, bits), layout_of(size)
    vector = Vector(Schema(layout, grid, {}), Lanes.of_grid(layout, grid))
    codes = np.random.default_rng(seed).integers(-grid.limit, grid.limit + 1, (sites, size)).astype(np.int32)
    codes[:, 0] = grid.limit
    total = np.zeros(vector.schema.size, np.int32)
    for row in codes:
        sent = vector.write(vector.pack(Update(layout, grid, row, 1.0)))
        assert sent.nbytes == packed_size(size, bits) + 4
        total += vector.read(sent)
    assert (vector.open(total, sites).codes == codes.sum(axis=0)).all()
    assert Lanes.of_grid(layout, Grid(sites)) is None


def test_which_codecs_have_a_ring():
    assert {kind: ring.bits for kind in CODECS if (ring := as_ring(CODECS[kind]()))} == {
        "int8": 8,
        "int4": 4,
        "int3": 3,
        "int2": 2,
        "ring": 8,
    }
    assert as_ring(Int8(64)) == Ring(8, 64)


def test_scales_of_a_plan_that_would_leave_32_bits_are_refused():
    layout, grid = layout_of(50), Grid(3)
    largest = Ring(8).largest(grid)
    assert Ring(8).limit << largest <= grid.limit < Ring(8).limit << largest + 1
    for scales in (b"", bytes([largest + 1]), bytes([largest, 0])):
        with pytest.raises(UpdateError, match="ring: "):
            Lanes.told(layout, {"B"}, Ring(8), scales, grid)
    with pytest.raises(UpdateError, match="take fewer"):
        Ring(16).largest(Grid(1 << 16))


@given(
    scales=st.binary(max_size=12),
    bits=st.integers(2, 16),
    sites=st.integers(1, 300),
    values=st.binary(max_size=260),
    count=st.integers(1, 5),
)
@few
def test_any_scales_and_any_vector_are_read_or_are_update_errors(scales, bits, sites, values, count):
    """What a coordinator and a site may send each other: nothing crashes, and what is taken never leaves the round's grid."""
    grid, layout = Grid(sites), layout_of(50)
    with contextlib.suppress(UpdateError):
        lanes = Lanes.told(layout, {"B"}, Ring(bits, 8), scales, grid)
        codes = lanes.grow(lanes.read(np.frombuffer(values, np.uint8), 3), min(count, sites))
        assert np.abs(codes[:50].astype(np.int64)).max() <= min(count, sites) * grid.limit
    scales = bytes(place % (Ring(bits).largest(grid) + 1) for place in range(7))
    lanes = Lanes.told(layout, {"B"}, Ring(bits, 8), scales, grid)
    whole = np.frombuffer((values + bytes(lanes.bytes(3)))[: lanes.bytes(3)], np.uint8)
    with contextlib.suppress(UpdateError):
        codes = lanes.grow(lanes.read(whole, 3), min(count, sites))
        assert np.abs(codes[:50].astype(np.int64)).max() <= min(count, sites) * grid.limit
