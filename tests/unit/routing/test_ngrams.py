"""Counts of n-grams are sums; a text that is spelled otherwise than a task's goes to the base although it embeds like them."""

from dataclasses import replace
from math import log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.central.cards import cards as cards_of
from fedpeft.errors import AdapterError
from fedpeft.routing import MahalanobisRouter, Measure, Moments, Request, RouterCard, make_router, pooled
from fedpeft.routing.closeness import TEXTED
from fedpeft.routing.moments import BUCKETS
from fedpeft.routing.ngrams import LONGEST, PRIOR, Spellings, counted, places

TEXTS = st.lists(st.text(max_size=30), min_size=1, max_size=5)
D, WORD = 4, 2**32


class Alike:
    """Embeds every text near one axis: embeddings tell nothing."""

    encoder, width = "alike@1", D

    def embed(self, texts):
        rows = np.eye(D)[0] + 0.1 * np.random.default_rng(len(texts)).standard_normal((len(texts), D))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def slow_places(text):
    codes, found = [2, *map(ord, text[:LONGEST]), 3], []
    for size in (1, 2, 3):
        for first in range(len(codes) - size + 1):
            word = 0
            for code in codes[first : first + size]:
                word = (word * 0x9E3779B1 + code + 1) % WORD
            word = (word + size) % WORD
            word = (word ^ word >> 16) * 0x85EBCA6B % WORD
            word = (word ^ word >> 13) * 0xC2B2AE35 % WORD
            found.append((word ^ word >> 16) % BUCKETS)
    return found


def moments(texts):
    return Moments(len(texts), np.zeros(2), np.eye(2), counted(texts))


@settings(max_examples=40)
@given(text=st.text(max_size=40))
def test_every_n_gram_has_its_bucket_on_every_machine(text):
    assert places(text).tolist() == slow_places(text)


def test_buckets_never_move():
    assert places("a").tolist() == [12933, 12762, 5069, 6288, 7652, 13465]
    assert len(places("x" * 5000)) == 3 * (LONGEST + 2) - 3


@settings(max_examples=15)
@given(sites=st.lists(TEXTS, min_size=1, max_size=3), other=TEXTS, asked=TEXTS)
def test_spellings_of_summed_counts_are_the_slow_ones_of_all_texts(sites, other, asked):
    mine = [text for site in sites for text in site]
    summed = Moments(len(mine), np.zeros(2), np.eye(2), sum(map(counted, sites)))
    pool = pooled([summed, moments(other)])
    likely, excess = Spellings.of([Measure(summed, pool)]).read(asked)
    own, theirs = ([bucket for text in texts for bucket in slow_places(text)] for texts in (mine, other))
    total = len(own) + len(theirs)
    q = {b: ((own.count(b) / len(own) + theirs.count(b) / len(theirs)) * total / 2 + 1) / (total + BUCKETS) for b in range(BUCKETS)}

    def p(bucket):
        return (own.count(bucket) + PRIOR * q[bucket]) / (len(own) + PRIOR)

    expected = sum(log(p(bucket) / q[bucket]) for bucket in own) / len(own)
    for text, found, over in zip(asked, likely[:, 0], excess[:, 0], strict=True):
        grams = slow_places(text)
        ratio = sum(log(p(bucket) / q[bucket]) for bucket in grams)
        assert found == pytest.approx(sum(log(p(bucket)) for bucket in grams))
        assert over == pytest.approx((ratio - len(grams) * expected) / sqrt(len(grams)), abs=1e-9)


@settings(max_examples=15)
@given(texts=TEXTS, other=TEXTS)
def test_texts_that_were_counted_exceed_by_nothing_in_all(texts, other):
    own = moments(texts)
    _, excess = Spellings.of([Measure(own, pooled([own, moments(other)]))]).read(texts)
    sizes = [len(places(text)) for text in texts]
    assert float(np.sqrt(sizes) @ excess[:, 0]) == pytest.approx(0.0, abs=1e-7 * sum(sizes))


def test_a_pool_counts_tasks_alike_and_nothing_where_one_was_not_counted():
    short, long = moments(["ab"]), moments(["cd" * 100] * 50)
    pool = pooled([short, long])
    assert pool.ngrams.sum() == pytest.approx(short.ngrams.sum() + long.ngrams.sum())
    assert pool.ngrams[places("ab")[1]] / pool.ngrams.sum() == pytest.approx(0.5 / len(places("ab")))
    assert pooled([short, replace(long, ngrams=np.zeros(0))]).ngrams.size == 0
    with pytest.raises(AdapterError, match="n-grams"):
        Spellings.of([Measure(replace(short, ngrams=np.zeros(0)), pool)])


@pytest.fixture(scope="module")
def cards():
    rng = np.random.default_rng(0)
    loud = ["".join(rng.choice(list("ABCDE !"), 30)) for _ in range(200)]
    calm = ["".join(rng.choice(list("abcde ."), 30)) for _ in range(200)]
    return cards_of({"loud": loud, "calm": calm}, Alike())


def test_tasks_and_strangers_that_embed_alike_are_told_apart_by_their_spelling(cards):
    router, rng, row = make_router("mahalanobis", cards), np.random.default_rng(1), Alike().embed(["x"])
    texts = {name: ["".join(rng.choice(list(signs), 30)) for _ in range(50)] for name, signs in (("loud", "ABCDE !"), ("calm", "abcde ."))}
    for name, mine in texts.items():
        assert np.mean([route.task == name for route in router.route_all(np.repeat(row, 50, 0), mine)]) > 0.9
    digits = Request.of(row[0], "alike@1", "".join(rng.choice(list("12345-\n"), 30)))
    assert router.route(digits).task is None
    assert make_router("chain", cards).route(digits).router == "base"
    assert replace(router, quantile=None).route(digits).task is not None
    assert router.route(Request.of(row[0], "alike@1")).task is not None  # who sends an embedding alone is judged by that alone


def test_cards_of_old_are_read_and_routed_to_as_before(cards):
    def bare(one):
        return replace(one, ngrams=np.zeros(0))

    old = {
        name: replace(
            card,
            moments=Measure(bare(card.moments.own), bare(card.moments.pool)),
            counts={kind: counts for kind, counts in card.counts.items() if kind != TEXTED},
        )
        for name, card in cards.items()
    }
    row = Alike().embed(["x"])[0]
    asked, untold = Request.of(row, "alike@1", "12345-"), Request.of(row, "alike@1")
    assert make_router("mahalanobis", old).route(asked) == make_router("mahalanobis", cards).route(untold)
    mixed = make_router("mahalanobis", {"calm": cards["calm"], "loud": old["loud"]})
    assert mixed.route(asked) == mixed.route(untold)
    assert RouterCard.from_bytes(old["calm"].to_bytes()).moments.own.ngrams.size == 0


def test_a_card_file_keeps_n_grams(cards):
    card = cards["calm"]
    again = RouterCard.from_bytes(card.to_bytes())
    np.testing.assert_array_equal(again.moments.own.ngrams, card.moments.own.ngrams)
    np.testing.assert_allclose(again.moments.pool.ngrams, card.moments.pool.ngrams, rtol=1e-6)
    assert again.counts[TEXTED] == card.counts[TEXTED]
    assert set(again.counts) == {MahalanobisRouter.kind, TEXTED}
    own = replace(card.moments.own, ngrams=np.ones(3))
    with pytest.raises(AdapterError, match="3 n-grams"):
        RouterCard.from_bytes(replace(card, moments=Measure(own, card.moments.pool)).to_bytes())
