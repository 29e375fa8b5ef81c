"""Noise: exact distributions, a source that cannot be predicted, and seeds that cannot get in."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
from fractions import Fraction
from math import erfc, exp, sqrt

import numpy as np
import pytest
from scipy import stats

from fedpeft.errors import PrivacyError
from fedpeft.privacy import gaussians
from fedpeft.privacy.noise import SecureNoise, check_secure


class SeededNoise:
    """A source that repeats itself: for tests alone."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def words(self, size: int) -> np.ndarray:
        return self._generator.integers(0, 1 << 64, size, np.uint64)


def pmf(kind: str, sigma: float, values: np.ndarray) -> np.ndarray:
    """The exact probabilities, from the definitions."""
    if kind == "rounded":
        tail = [0.5 * erfc((value - 0.5) / (sigma * sqrt(2))) for value in [*values, values[-1] + 1]]
        return -np.diff(tail)
    whole = np.arange(-int(15 * sigma) - 5, int(15 * sigma) + 6)
    return np.exp(-0.5 * (values / sigma) ** 2) / np.exp(-0.5 * (whole / sigma) ** 2).sum()


def chi_square(drawn: np.ndarray, kind: str, sigma: float) -> float:
    """The p-value of ``drawn`` against the exact distribution, in cells of at least ten expected values."""
    edge = int(6 * sigma) + 2
    values = np.arange(-edge, edge + 1)
    expected = pmf(kind, sigma, values) * len(drawn)
    seen = np.bincount(np.clip(drawn, -edge, edge) + edge, minlength=len(values))
    cells = np.floor(np.cumsum(expected) / max(10.0, len(drawn) / 300)).astype(int)
    want, got = np.bincount(cells, expected), np.bincount(cells, seen)
    keep = want > 0
    return float(stats.chisquare(got[keep], want[keep] * got.sum() / want.sum()).pvalue)


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0, 5.0, 16.5, 300.0])
@pytest.mark.parametrize("kind", ["discrete", "rounded"])
def test_samples_follow_the_exact_probabilities(kind, sigma):
    drawn = getattr(gaussians, kind)(SeededNoise(1).words, 300_000, sigma)
    assert chi_square(drawn, kind, sigma) > 1e-3


@pytest.mark.parametrize("kind", ["discrete", "rounded"])
def test_a_wide_gaussian_is_gaussian_to_kolmogorov_and_smirnov(kind):
    drawn = getattr(gaussians, kind)(SeededNoise(2).words, 500_000, 2.0**26)
    assert stats.kstest(drawn / 2.0**26, "norm").pvalue > 1e-3
    assert abs(float(np.mean((drawn / 2.0**26) ** 4)) - 3.0) < 0.06


@pytest.mark.parametrize("kind", ["discrete", "rounded"])
def test_exact_decisions_give_the_same_distribution_as_quick_ones(kind):
    table = gaussians._table(3.0, kind == "rounded")
    slow = dataclasses.replace(table, squeeze=np.zeros_like(table.squeeze))
    source = SeededNoise(3)
    drawn = []
    while len(drawn) < 1500:
        block = np.array([int(source.words(1)[0]) % table.tail])
        kept = source.words(1)[0] % np.uint64(table.weight.max()) < np.uint64(table.weight[block[0]])
        choice = gaussians.Choice(
            int(table.first[block[0]]), Fraction(table.scale) / int(table.weight[block[0]]), 0, 0, int(source.words(1)[0])
        )
        if kept and gaussians._exactly(source.words, slow, choice):
            drawn.append(choice.value)
    assert table.shift == 0
    assert chi_square(np.array(drawn), kind, 3.0) > 1e-3


@pytest.mark.parametrize(("kind", "value"), [("discrete", 0), ("discrete", -7), ("rounded", 0), ("rounded", 9)])
def test_bounds_close_in_on_the_chance(kind, value):
    table = gaussians._table(3.0, kind == "rounded")
    choice = gaussians.Choice(value, Fraction(1, 2), 0, 0)
    low, high = gaussians._bounds(table, choice, 1 << 127, 128)
    chance = 0.5 * exp(-0.5 * (value / 3.0) ** 2)
    assert float(low) == pytest.approx(chance, rel=1e-12)
    assert 0 < float(high - low) < 1e-30


@pytest.mark.parametrize("sigma", [0.5, 3.0, 40.0, 1e6])
def test_the_tail_goes_on_where_the_blocks_end(sigma):
    table = gaussians._table(sigma, False)
    source, width = SeededNoise(4), gaussians.FINE << table.shift
    edge = -int(table.first[0])
    for _ in range(200):
        choice = gaussians._beyond(source.words, table)
        beyond = choice.value - edge if choice.value >= 0 else -1 - choice.value - edge
        assert beyond >= 0
        proposed = Fraction(1, 2) * Fraction(1, 2 ** (beyond // width + 1)) / width
        assert proposed * choice.factor == Fraction(table.scale)
        assert gaussians._bounds(table, choice, 0, 64)[1] < Fraction(1, 10**12)


@pytest.mark.parametrize("sigma", [0.06, 0.5, 3.0, 77.0, 2.0**20, 2.0**30])
@pytest.mark.parametrize("spread", [False, True])
def test_no_probability_is_above_one_and_no_slot_is_missing(sigma, spread):
    table = gaussians._table(sigma, spread)
    assert len(table.blocks) == gaussians.SLOTS
    assert set(range(table.tail + 1)) <= set(table.blocks.tolist())
    assert (table.squeeze <= np.uint64(1 << table.left)).all()
    half = 0.5 if spread else 0.0
    last = table.first[:-2] + (1 << table.shift) - 1
    near = np.maximum(np.where(table.first[:-2] >= 0, table.first[:-2], -last) - half, 0.0)
    assert (table.scale * 2.0**table.shift * np.exp(-0.5 * (near / sigma) ** 2) <= table.weight[:-2]).all()


@pytest.mark.parametrize("sigma", [0.0, -1.0, 0.01, float("nan"), float("inf"), 2.0**31])
def test_an_impossible_deviation_is_refused(sigma):
    with pytest.raises(PrivacyError, match="standard deviation"):
        SecureNoise().discrete(3, sigma)


def test_no_two_sources_agree_and_words_are_uniform():
    first, second = SecureNoise().words(100_000), SecureNoise().words(100_000)
    assert not np.intersect1d(first, second).size
    counts = np.bincount(first.view(np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-9
    source = SecureNoise()
    assert not np.array_equal(source.words(5), source.words(5))


def test_words_cross_blocks_without_repeating():
    drawn = SecureNoise().words(100_003)
    assert len(np.unique(drawn)) == 100_003


def test_a_forked_process_draws_other_noise():
    source = SecureNoise()
    source.words(1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, source.words(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(read, 32), np.uint64)
    assert not np.intersect1d(theirs, source.words(4)).size


def test_gaussian_has_the_deviation_asked_for():
    drawn = SecureNoise().gaussian(200_000, 0.5)
    assert stats.kstest(drawn / 0.5, "norm").pvalue > 1e-9


def test_poisson_sampling_takes_each_by_itself():
    taken = SecureNoise().chosen(200_000, 0.25)
    assert abs(float(taken.mean()) - 0.25) < 7 * sqrt(0.25 * 0.75 / 200_000)
    assert SecureNoise().chosen(10, 1.0).all()
    assert not SecureNoise().chosen(10, 0.0).any()


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_source_cannot_be_copied_or_stored(act):
    with pytest.raises(PrivacyError, match="cannot be copied"):
        act(SecureNoise())


def test_seeded_noise_cannot_be_used_or_configured():
    class Fake(SecureNoise):
        pass

    for source in (SeededNoise(0), Fake(), np.random.default_rng(0), None):
        with pytest.raises(PrivacyError, match="SecureNoise"):
            check_secure(source)
    with pytest.raises(TypeError):
        SecureNoise(1)
