"""Draws follow the distribution that was asked for, and log-probabilities are those of a float64 softmax."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.serving import Sampling
from fedpeft.serving.sampling import Sampler, adjusted, nucleus

LOGITS = st.lists(st.floats(-6, 6, width=32), min_size=2, max_size=12).map(lambda values: np.array(values, np.float32))


def softmax(values):
    shares = np.exp(values.astype(np.float64) - values.max())
    return shares / shares.sum()


@given(logits=LOGITS, top_p=st.floats(0.01, 1.0))
def test_the_nucleus_is_the_smallest_set_of_the_likeliest_that_holds_its_mass(logits, top_p):
    shares, kept = softmax(logits), nucleus(logits.astype(np.float64), top_p)
    inside = kept > 0
    assert np.isclose(kept.sum(), 1.0)
    assert shares[inside].sum() >= min(top_p, 1.0) - 1e-12
    assert shares[inside].min() >= shares[~inside].max(initial=0.0) - 1e-15
    if inside.sum() > 1:
        assert shares[inside].sum() - shares[inside].min() < top_p + 1e-12
    assert np.allclose(kept[inside], shares[inside] / shares[inside].sum())


def test_draws_have_the_asked_frequencies():
    logits, temperature = np.array([2.0, 1.0, 0.0, -1.0], np.float32), 0.8
    sampler = Sampler(Sampling(temperature=temperature, seed=5))
    drawn = np.bincount([sampler.choose(logits, 0).id for _ in range(20_000)], minlength=4) / 20_000
    assert np.abs(drawn - softmax(logits / temperature)).max() < 0.015


def test_one_seed_gives_one_sequence():
    logits = np.zeros(50, np.float32)
    first, second = (Sampler(Sampling(seed=9)) for _ in range(2))
    assert [first.choose(logits, 0).id for _ in range(20)] == [second.choose(logits, 0).id for _ in range(20)]


@given(logits=LOGITS, top=st.integers(0, 4))
def test_log_probabilities_are_those_of_the_softmax(logits, top):
    token = Sampler(Sampling(temperature=0.0, top_logprobs=top)).choose(logits, int(logits.argmax()))
    logs = np.log(softmax(logits))
    assert token.logprob is not None
    assert np.isclose(token.logprob, logs[token.id])
    assert np.allclose([value for _, value in token.top], np.sort(logs)[::-1][:top])


@given(logits=LOGITS, presence=st.floats(-2, 2), frequency=st.floats(-2, 2), bias=st.floats(-5, 5))
def test_penalties_and_bias_shift_logits_as_documented(logits, presence, frequency, bias):
    settings = Sampling(presence_penalty=presence, frequency_penalty=frequency, logit_bias={1: bias})
    moved = adjusted(logits, settings, {0: 3}) - logits.astype(np.float64)
    assert np.isclose(moved[0], -3 * frequency - presence)
    assert np.isclose(moved[1], bias)
    assert not moved[2:].any()
