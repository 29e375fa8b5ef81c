"""Second moments are sums; tasks are Gaussians made of them; what is near to none of them goes to the base."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import AdapterError
from fedpeft.routing import MahalanobisRouter, Measure, Moments, Request, RouterCard, TaskRouter, counts_of, make_card, make_router, pooled
from fedpeft.routing.cards import histogram
from fedpeft.routing.gaussians import Gaussian, Gaussians, shrunk
from fedpeft.routing.moments import WIDEST, halves, moments, narrowed, packed, sums, unpacked, values_of

D = 6
SEEDS = st.integers(0, 2**32 - 1)


def texts(seed, count, place, spread=0.4):
    """Unit-norm embeddings around an axis, wider along the next one."""
    rng = np.random.default_rng(seed)
    rows = np.eye(D)[place] + spread * rng.standard_normal((count, D)) * np.where(np.arange(D) == (place + 1) % D, 2.0, 0.5)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def card_of(rows, pool=None):
    own = moments(sums(halves(rows)[0]))
    measure = Measure(own, pool or pooled([own]))
    close = Gaussians.of([measure]).read(halves(rows)[1])[1][:, 0]
    total = rows.sum(axis=0, dtype=np.float64)
    card = make_card(total, len(rows), histogram(rows, (total / np.linalg.norm(total)).astype(np.float32)), encoder="base@x")
    return RouterCard(card=card, counts={"mahalanobis": counts_of(close)}, moments=measure)


def beside(tasks, pool):
    return Gaussians.of([Measure(one, pooled(pool)) for one in tasks])


@pytest.fixture(scope="module")
def cards():
    rows = {name: texts(place, 400, place) for place, name in enumerate(("area", "kind", "verb"))}
    pool = pooled([moments(sums(halves(mine)[0])) for mine in rows.values()])
    return {name: card_of(mine, pool) for name, mine in rows.items()}


@settings(max_examples=40)
@given(seed=SEEDS, left=st.integers(1, 30), right=st.integers(1, 30), width=st.integers(1, 9))
def test_sums_of_two_sites_are_the_moments_of_all_their_rows(seed, left, right, width):
    rows = np.random.default_rng(seed).standard_normal((left + right, width)).astype(np.float32)
    total = sums(rows[:left]) + sums(rows[left:])
    found = moments(total)
    assert len(total) == values_of(width)
    assert found.count == left + right
    np.testing.assert_allclose(found.mean, rows.astype(float).mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows.astype(float).T, bias=True).reshape(width, width), atol=1e-12)
    np.testing.assert_array_equal(unpacked(packed(found.covariance)), np.triu(found.covariance) + np.triu(found.covariance, 1).T)


@settings(max_examples=20)
@given(seed=SEEDS, order=st.permutations(range(4)))
def test_whitening_knows_no_order_of_sites_or_tasks(seed, order):
    rng = np.random.default_rng(seed)
    sites = [sums(texts(rng.integers(2**31), 20, place % 2)) for place in range(4)]
    own = [moments(sites[0] + sites[2]), moments(sites[1] + sites[3])]
    turned = [moments(sum(sites[site] for site in order if site % 2 == place)) for place in (0, 1)]
    rows = texts(seed, 5, 3)
    for one, other in zip(beside(own, own).read(rows), beside(turned, turned[::-1]).read(rows), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)


@settings(max_examples=25)
@given(seed=SEEDS)
def test_a_density_is_the_textbooks(seed):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((D, D))
    covariance, mean, rows = root @ root.T + np.eye(D), rng.standard_normal(D), rng.standard_normal((4, D))
    found = Gaussian.of(mean, covariance)
    exact = covariance + 1e-3 * np.trace(covariance) / D * np.eye(D)
    np.testing.assert_allclose(found.distances(rows), [(row - mean) @ np.linalg.inv(exact) @ (row - mean) for row in rows], rtol=1e-8)
    assert found.volume == pytest.approx(np.linalg.slogdet(exact)[1])
    noisy = Gaussian.of(mean, covariance - 2 * np.linalg.eigvalsh(covariance)[0] * np.eye(D))
    assert np.isfinite(noisy.distances(rows)).all()
    assert np.isfinite(noisy.volume)


@settings(max_examples=25)
@given(seed=SEEDS, count=st.integers(1, 10_000))
def test_shrinkage_keeps_the_trace_and_ends_at_a_sphere(seed, count):
    root = np.random.default_rng(seed).standard_normal((D, 3))
    covariance = root @ root.T
    found = shrunk(covariance, count)
    assert np.trace(found) == pytest.approx(np.trace(covariance))
    before, after = np.linalg.eigvalsh(covariance), np.linalg.eigvalsh(found)
    assert before[0] - 1e-9 <= after[0] <= after[-1] <= before[-1] + 1e-9
    np.testing.assert_allclose(shrunk(np.eye(D), count), np.eye(D))


@settings(max_examples=30)
@given(seed=SEEDS, pair=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_larger_quantile_sends_more_to_the_base_and_changes_no_other_route(cards, seed, pair):
    rows = texts(seed, 20, seed % D, 1.0)
    known = {name: card.moments for name, card in cards.items()}
    counts = {name: card.counts["mahalanobis"] for name, card in cards.items()}
    loose, strict = (MahalanobisRouter({}, known, counts, quantile=quantile).route_all(rows) for quantile in sorted(pair))
    assert all(one.weights == other.weights for one, other in zip(loose, strict, strict=True) if other.weights)
    assert sum(not route.weights for route in strict) >= sum(not route.weights for route in loose)


def test_texts_go_to_their_task_and_one_in_fifty_to_the_base(cards):
    router = make_router("mahalanobis", cards)
    for place, name in enumerate(cards):
        routes = router.route_all(texts(100 + place, 1000, place))
        assert 0.94 <= np.mean([route.task == name for route in routes]) <= 0.995
        assert all(sum(route.weights.values()) == pytest.approx(1.0) for route in routes if route.weights)
    away = [route.task is None for route in router.route_all(texts(7, 200, 4))]
    assert np.mean(away) > 0.9


def test_a_task_is_as_near_whichever_others_are_served(cards):
    alone = make_router("mahalanobis", {"kind": cards["kind"]})
    for row in (*texts(9, 20, 1), *texts(10, 20, 4)):
        one, all_ = (router.route(Request.of(row)) for router in (alone, make_router("mahalanobis", cards)))
        assert one.scores["kind"] == pytest.approx(all_.scores["kind"])
    assert np.mean([route.task == "kind" for route in alone.route_all(texts(101, 200, 1))]) > 0.9


def test_a_chain_over_second_moments_ends_at_the_base(cards):
    chain, stranger = make_router("chain", cards), Request.of(texts(7, 1, 4)[0], "base@x")
    route = chain.route(stranger)
    assert (route.task, route.router) == (None, "base")
    assert "is below its threshold" in route.why
    assert chain.route(Request("verb")).router == TaskRouter.kind
    assert chain.route(Request.of(texts(8, 1, 1, 0.1)[0], "base@x")).router == "mahalanobis"
    old = RouterCard(cards["area"].card)
    assert make_router("chain", {**cards, "old": old}).route(stranger).task is None
    assert {router.kind for router in make_router("chain", {**cards, "old": old}).routers} == {"task", "centroid", "within"}


def test_a_card_file_keeps_moments_and_an_old_one_has_none(cards):
    card = cards["kind"]
    again = RouterCard.from_bytes(card.to_bytes())
    np.testing.assert_allclose(again.moments.own.covariance, card.moments.own.covariance, atol=1e-7)
    assert again.to_bytes() == card.to_bytes()
    assert RouterCard.from_bytes(RouterCard(card.card).to_bytes()).moments is None
    whole, short, empty = (Moments(count, np.zeros(width), np.eye(3)) for count, width in ((3.0, 3), (3.0, 2), (0.0, 3)))
    for wrong in (Measure(short, whole), Measure(whole, empty)):
        with pytest.raises(AdapterError, match="moments of"):
            RouterCard.from_bytes(RouterCard(moments=wrong).to_bytes())


def test_wide_embeddings_keep_their_distances():
    rows = np.random.default_rng(0).standard_normal((20, 2048)).astype(np.float32)
    found = narrowed(rows)
    assert found.shape == (20, WIDEST)
    far, near = (np.linalg.norm(given[:, None] - given[None], axis=-1)[np.triu_indices(20, 1)] for given in (rows, found))
    assert np.abs(near / far - 1).max() < 0.2
    assert found[0, 0] == pytest.approx(narrowed(rows[:1])[0, 0])
    assert len(sums(rows[:1])) == values_of(2048)


@pytest.mark.parametrize("wrong", [[], [1.0, 2.0], [0.0, 0.0, 0.0], [1.0, np.nan, 1.0]])
def test_sums_of_no_texts_are_refused(wrong):
    with pytest.raises(AdapterError, match="moments"):
        moments(wrong)


def test_widths_must_agree(cards):
    with pytest.raises(AdapterError, match="one encoder"):
        pooled([cards["kind"].moments.own, moments(sums(np.ones((3, 2), np.float32)))])
    with pytest.raises(AdapterError, match="an embedding has 2 values, the cards have 6"):
        make_router("mahalanobis", cards).route(Request.of(np.ones(2)))
    with pytest.raises(AdapterError, match=r"routing.moments = true"):
        make_router("mahalanobis", {"old": RouterCard(cards["area"].card)})
