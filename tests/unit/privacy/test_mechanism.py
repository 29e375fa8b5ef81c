"""Client-level noise: bounded vectors, the right noise in the right place, one event for all that travels."""

from __future__ import annotations

import dataclasses
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.privacy.sums import COUNTERS, LAYOUT, MODES, NOISE, SEEN, delta, total

from fedpeft.errors import PrivacyError, UpdateError
from fedpeft.privacy.accounting import Event
from fedpeft.privacy.mechanism import SIDE, Mechanism, check_shares, protect, release
from fedpeft.privacy.packing import Schema, pack, unpack
from fedpeft.privacy.settings import (
    Central,
    Cohort,
    of_evaluation,
)
from fedpeft.tensors import Entry, Layout
from fedpeft.update import Update


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=20, deadline=None)
@given(
    size=st.sampled_from([0.0, 1e-6, 0.5, 1.0, 1e3, 1e18]), clip=st.floats(1e-3, 1e3), sites=st.integers(1, 2000), bits=st.integers(20, 32)
)
def test_no_packed_vector_is_longer_than_the_sensitivity(mode, size, clip, sites, bits):
    one = Mechanism(1.0, clip, sites, bits=bits, **mode)
    update = protect(delta(size), {name: (1e30,) * item.length for name, item in COUNTERS.items()}, one, NOISE)
    length = np.sqrt(float((update.codes.astype(object) ** 2).sum())) * update.grid.step
    assert length <= one.sensitivity
    assert update.weight == 1.0
    assert not update.counters
    if size > clip and not mode and bits == 32:
        assert length == pytest.approx(clip, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_removing_a_site_moves_the_sum_by_the_sensitivity_at_most(mode):
    one = Mechanism(1.0, 0.7, 8, **mode)
    updates = [protect(delta(5.0, site), SEEN, one, NOISE).codes.astype(np.int64) for site in range(8)]
    whole = sum(updates)
    for update in updates:
        assert np.linalg.norm((whole - (whole - update)) * one.grid.step) <= one.sensitivity


@pytest.mark.parametrize("shares", [0, 4])
@pytest.mark.parametrize("mode", MODES)
def test_the_sum_carries_the_noise_that_was_promised(shares, mode):
    one = Mechanism(2.0, 0.5, 6, shares, **mode)
    residues = []
    for _ in range(60):
        found = release(total(one, 6, 0.1), one, NOISE)
        clean = np.mean([delta(0.1, site).flat for site in range(6)], axis=0)
        residues.append((found.mean.flat - clean) * 6)
    promised = one.deviation * (sqrt(6 / shares) if shares else 1.0)
    assert np.std(residues) == pytest.approx(promised, rel=7 / sqrt(2 * 60 * LAYOUT.size))


def test_the_least_survivors_carry_the_whole_noise():
    one = Mechanism(2.0, 0.5, 6, 4)
    residues = [release(total(one, 4, 0.0), one, NOISE).mean.flat * 4 for _ in range(60)]
    assert np.std(residues) == pytest.approx(one.deviation, rel=7 / sqrt(2 * 60 * LAYOUT.size))
    with pytest.raises(PrivacyError, match="3 sites"):
        release(total(one, 3, 0.0), one, NOISE)


def test_counters_and_bit_are_read_back_within_their_noise():
    one = Mechanism(1e-3, 1.0, 4, side=0.3, counters=COUNTERS, adaptive=True)
    updates = [protect(delta(size, 1), SEEN, one, NOISE) for size in (0.2, 0.5, 0.9, 5.0)]
    found = release(sum(updates[1:], start=updates[0]), one, NOISE)
    assert found.counters["train.loss"] == pytest.approx((40.0, 80.0), abs=7 * 1e-3 * one.sensitivity / one.unit * 50)
    assert found.counters["train.seen"] == pytest.approx((2000.0,), abs=7 * 1e-3 * one.sensitivity / one.unit * 1000)
    assert "train.tokens" not in found.counters
    assert found.inside == pytest.approx(0.75, abs=0.01)


def test_evaluation_travels_without_a_delta():
    chosen = Central(8.0, counters={"train.loss": 50.0}, evaluation=2.0)
    one = of_evaluation(chosen, 1e-3, Cohort(4, 3), {"train.loss": 2, "other": 1})
    empty = Layout(())
    found = release(total(one, 4, 0.0, empty), one, NOISE)
    assert found.mean.flat.size == 0
    assert found.counters["train.loss"] == pytest.approx((40.0, 80.0), abs=2.0)
    assert one.event(2) == Event(2e-3)
    assert of_evaluation(Central(8.0), 1.0, Cohort(4, 3), {"train.loss": 2}) is None


def test_one_vector_is_one_event_whatever_travels_in_it():
    for mode in MODES:
        assert Mechanism(1.5, 1.0, 8, **mode).event(280) == Event(1.5)
        spread = Mechanism(1.5, 1.0, 8, 5, **mode).event(280)
        assert spread.concentrated
        assert spread.noise == pytest.approx(1.5, rel=1e-12)
    assert Mechanism(1.5, 1.0, 8, rate=0.25).event(280) == Event(1.5, 0.25)


@pytest.mark.parametrize("shares", [0, 2])
def test_the_packed_vector_survives_packing_and_masks(shares):
    one = Mechanism(1.0, 1.0, 3, shares, side=0.1, counters=COUNTERS)
    updates = [protect(delta(1.0, site), SEEN, one, NOISE) for site in range(3)]
    schema = Schema(one.layout(LAYOUT), one.grid, {})
    with np.errstate(over="ignore"):
        summed = unpack(sum(pack(update, schema) for update in updates), schema, 3)
    assert np.array_equal(summed.codes, sum(updates[1:], start=updates[0]).codes)
    release(summed, one, NOISE)


@pytest.mark.parametrize("shares", [0, 3])
def test_few_bits_hold_the_sum_and_are_unbiased_beside_the_noise(shares):
    """Twelve bits for three sites: a value is 2^-7 of the sensitivity, far above most deltas, and yet the mean over many is right."""
    small = Layout.of([Entry("B", "q.lora_B", (16,))])
    one = Mechanism(0.01, 1.0, 3, shares, bits=12)
    deltas = [delta(0.3, site, small) for site in range(3)]
    released = []
    for _ in range(400):
        updates = [protect(value, {}, one, NOISE) for value in deltas]
        summed = sum(updates[1:], start=updates[0])
        assert np.abs(summed.codes).max() < 2**11
        released.append(release(summed, one, NOISE).mean.flat.astype(np.float64))
    spread = np.sqrt(3 * one.grid.step**2 / 4 + one.deviation**2) / 3
    assert np.abs(np.mean(released, axis=0) - sum(value.flat for value in deltas) / 3).max() < 5.5 * spread / np.sqrt(400)
    assert Mechanism.from_json(one.to_json()) == one
    with pytest.raises(UpdateError, match="bits for 3 sites"):
        protect(deltas[0], {}, Mechanism(0.01, 1.0, 3, bits=3), NOISE)


def test_noise_lies_on_the_grid_and_is_new_every_time():
    one = Mechanism(1.0, 1.0, 3)
    plain = total(one, 3)
    first, second = (release(plain, one, NOISE).mean.flat.astype(np.float64) * 3 for _ in range(2))
    assert (first != second).mean() > 0.99
    spread = Mechanism(1.0, 1.0, 3, 3)
    assert (protect(delta(1.0), {}, spread, NOISE).codes != protect(delta(1.0), {}, spread, NOISE).codes).mean() > 0.99


def test_sampling_divides_by_the_cohort_that_is_expected():
    one = Mechanism(1e-6, 1.0, 10, rate=0.5)
    found = release(total(one, 2, 0.5), one, NOISE).mean.flat
    clean = sum(delta(0.5, site).flat for site in range(2)) / 5
    assert found == pytest.approx(clean, abs=1e-4)
    nobody = Update.zero(one.layout(LAYOUT), one.grid)
    assert np.abs(release(nobody, one, NOISE).mean.flat).max() < 1e-4


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda t: dataclasses.replace(t, weight=2.5), "weights"),
        (lambda t: dataclasses.replace(t, counters={"x": (1.0,)}), "counters"),
        (lambda t: dataclasses.replace(t, count=9, weight=9.0), "9 sites"),
        (lambda t: dataclasses.replace(t, grid=dataclasses.replace(t.grid, reach=7.0)), "grid"),
        (lambda t: dataclasses.replace(t, layout=LAYOUT), "counters"),
    ],
)
def test_a_sum_that_is_not_the_mechanisms_is_not_released(spoil, word):
    one = Mechanism(1.0, 1.0, 3, side=0.1, adaptive=True)
    with pytest.raises(PrivacyError, match=word):
        release(spoil(total(one, 3)), one, NOISE)


def test_only_secure_noise_protects_and_releases():
    one = Mechanism(1.0, 1.0, 3)
    with pytest.raises(PrivacyError, match="SecureNoise"):
        protect(delta(1.0), {}, one, np.random.default_rng(0))
    with pytest.raises(PrivacyError, match="SecureNoise"):
        release(total(one, 3), one, np.random.default_rng(0))


def test_a_site_sends_nothing_under_masks_that_open_with_too_little_noise():
    check_shares(Mechanism(1.0, 1.0, 6, 4), 4)
    check_shares(Mechanism(1.0, 1.0, 6), 1)
    with pytest.raises(PrivacyError, match="divided among 4"):
        check_shares(Mechanism(1.0, 1.0, 6, 4), 3)


def test_a_diverged_site_or_a_missing_counter_is_refused():
    one = Mechanism(1.0, 1.0, 3, side=0.1, counters=COUNTERS)
    bad = delta(1.0)
    bad.flat[3] = np.nan
    with pytest.raises(PrivacyError, match="not finite"):
        protect(bad, SEEN, one, NOISE)
    with pytest.raises(PrivacyError, match=r"train\.seen"):
        protect(delta(1.0), {"train.loss": (1.0, 1.0)}, one, NOISE)


@pytest.mark.parametrize(
    "numbers",
    [
        {"noise": 0.0},
        {"clip": 0.0},
        {"noise": float("inf")},
        {"shares": 4},
        {"side": 0.1},
        {"side": 1.5, "adaptive": True},
        {"adaptive": True},
        {"rate": 0.5, "shares": 2},
        {"sites": 0},
    ],
)
def test_impossible_mechanisms_are_refused(numbers):
    with pytest.raises(PrivacyError, match="privacy"):
        Mechanism(**({"noise": 1.0, "clip": 1.0, "sites": 3} | numbers))


def test_mechanisms_survive_json():
    one = Mechanism(1.5, 0.7, 9, 5, 0.1, COUNTERS, True)
    assert Mechanism.from_json(one.to_json()) == one
    with pytest.raises(PrivacyError, match="cannot be read"):
        Mechanism.from_json({"noise": 1})


def test_side_roles_sort_behind_every_role_of_an_adapter():
    one = Mechanism(1.0, 1.0, 3, side=0.1, counters=COUNTERS, adaptive=True)
    entries = one.layout(LAYOUT).entries
    assert [entry.role for entry in entries][-3:] == [SIDE] * 3
    assert entries[: len(LAYOUT.entries)] == LAYOUT.entries
