"""Clipping, rounding, the clip that follows a quantile, and the self-test that finds noise or clipping missing."""

from __future__ import annotations

import numpy as np
import pytest
from tests.unit.privacy.sums import LAYOUT, MODES, NOISE, delta

import fedpeft.privacy.mechanism as mechanism_module
from fedpeft.errors import PrivacyError
from fedpeft.privacy.clipping import bounded, clipped, moved
from fedpeft.privacy.mechanism import Mechanism, protect, release
from fedpeft.privacy.noise import SecureNoise
from fedpeft.privacy.selftest import check_moved, self_test
from fedpeft.tensors import Tensors

# clipping


def test_clipping_scales_down_and_never_up():
    values = delta(3.0).flat
    assert np.linalg.norm(clipped(values, 1.0)) == pytest.approx(1.0)
    assert np.array_equal(clipped(values, 5.0), values.astype(np.float64))
    assert not clipped(np.zeros(4), 1.0).any()
    assert np.linalg.norm(clipped(np.full(10, 3e38, np.float32), 1.0)) == pytest.approx(1.0)


@pytest.mark.parametrize("rounding", [np.ceil, np.rint, lambda v: np.rint(v / 16) * 16])
def test_coarse_rounding_stays_within_the_bound(rounding):
    values = np.random.default_rng(0).normal(size=5000)
    made = bounded(values * 400 / np.linalg.norm(values), 400.0, rounding)
    assert np.linalg.norm(made) <= 400.0


@pytest.mark.parametrize("seed", range(8))
def test_fine_rounding_ends_just_below_the_bound(seed):
    values = np.random.default_rng(seed).normal(size=280)
    made = bounded(values * 1e7 / np.linalg.norm(values), 1e7, np.rint)
    assert 1e7 * (1 - 1e-5) < np.linalg.norm(made) <= 1e7


def test_a_codec_that_cannot_be_bounded_is_refused():
    with pytest.raises(PrivacyError, match="finer codec"):
        bounded(np.ones(10), 1.0, lambda values: np.full(10, 5.0))


@pytest.mark.parametrize("start", [1e-3, 50.0])
@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
def test_adaptive_clipping_finds_the_quantile_from_both_sides(start, quantile):
    norms = np.random.default_rng(1).lognormal(size=4000)
    clip, path = start, []
    for _ in range(400):
        clip = moved(clip, float((norms <= clip).mean()) + float(NOISE.gaussian(1, 0.02)[0]), quantile, 0.2, start)
        path.append(clip)
    assert np.mean(path[-50:]) == pytest.approx(np.quantile(norms, quantile), rel=0.1)


def test_the_norm_moves_the_right_way():
    assert moved(1.0, 0.0, 0.5, 0.2, 1.0) > 1.0 > moved(1.0, 1.0, 0.5, 0.2, 1.0)
    assert moved(1.0, 0.5, 0.5, 0.2, 1.0) == 1.0
    assert moved(1.0, -99.0, 0.5, 0.2, 1.0) == moved(1.0, 0.0, 0.5, 0.2, 1.0)


def test_adaptive_clipping_works_through_the_noised_sum():
    clip = 8.0
    for _ in range(40):
        one = Mechanism(0.5, clip, 20, 15, side=0.2, adaptive=True)
        updates = [protect(delta(0.1 * (site + 1), site), {}, one, NOISE) for site in range(20)]
        clip = moved(clip, release(sum(updates[1:], start=updates[0]), one, NOISE).inside, 0.5, 0.2, 8.0)
    assert 0.7 < clip < 1.5


# self-test


@pytest.mark.parametrize("shares", [0, 3, 9])
@pytest.mark.parametrize("mode", MODES)
def test_a_sound_mechanism_passes_its_self_test(shares, mode):
    found = self_test(Mechanism(1.0, 0.3, 12, shares, **mode), LAYOUT, NOISE)
    assert 0.7 < found.noise < 1.3
    assert found.values >= 280


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_missing_or_misscaled_noise_fails_the_self_test(monkeypatch, factor):
    honest = SecureNoise.rounded
    monkeypatch.setattr(SecureNoise, "rounded", lambda self, size, sigma: np.rint(honest(self, size, sigma) * factor).astype(np.int64))
    with pytest.raises(PrivacyError, match="self-test"):
        self_test(Mechanism(1.0, 0.3, 6), LAYOUT, NOISE)


def test_missing_clipping_fails_the_self_test(monkeypatch):
    monkeypatch.setattr(mechanism_module, "clipped", lambda values, bound: values.astype(np.float64) * 0.01)
    with pytest.raises(PrivacyError, match="self-test"):
        self_test(Mechanism(0.01, 0.3, 6), LAYOUT, NOISE)


def test_tensors_that_stood_still_are_named():
    before = delta(1.0)
    after = Tensors(LAYOUT, before.flat.copy())
    after.named()["q.lora_B"][:] += 1
    check_moved(before, after, {"B"})
    with pytest.raises(PrivacyError, match=r"score\.weight"):
        check_moved(before, after, {"B", "head"})
    with pytest.raises(PrivacyError, match="0 trained"):
        check_moved(before, after, {"A"})
