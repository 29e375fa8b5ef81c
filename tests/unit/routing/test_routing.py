"""Cards are made of sums; routers choose by them and abstain below the threshold."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import AdapterError
from fedpeft.routing import BINS, ROUTERS, Card, CentroidRouter, Request, TaskRouter, calibrate, centroid, histogram, make_card

D = 16


def texts(seed, count, direction, spread=0.5):
    """Unit-norm embeddings around ``direction``."""
    rng = np.random.default_rng(seed)
    rows = direction + spread * rng.standard_normal((count, D)) / np.sqrt(D)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def axis(place):
    return np.eye(D, dtype=np.float32)[place]


def of(rows, quantile=0.05):
    direction = centroid(rows.sum(axis=0), len(rows))
    return make_card(rows.sum(axis=0), len(rows), histogram(rows, direction), quantile)


@given(st.lists(st.integers(0, 50), min_size=BINS, max_size=BINS), st.floats(0, 1))
def test_calibrate_is_the_quantile_to_within_a_bin(counts, quantile):
    threshold = calibrate(counts, quantile)
    if not sum(counts):
        assert threshold == -1.0
        return
    width = 2 / BINS
    values = np.repeat(-1 + width * (np.arange(BINS) + 0.5), counts)
    exact = np.quantile(values, quantile, method="inverted_cdf")
    assert abs(threshold - exact) <= width / 2 + 1e-9
    edges = -1 + width * np.arange(BINS)
    surely_below = sum(c for c, left in zip(counts, edges, strict=True) if left + width <= threshold)
    assert surely_below <= quantile * sum(counts) + 1e-6


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40))
def test_cards_of_split_data_are_the_card_of_all_of_it(seed, left, right):
    rows = texts(seed, left + right, axis(3))
    parts = rows[:left], rows[left:]
    total = sum(part.sum(axis=0, dtype=np.float64) for part in parts)
    direction = centroid(total, left + right)
    counts = np.sum([histogram(part, direction) for part in parts], axis=0)
    assert counts.sum() == left + right
    assert np.linalg.norm(direction) == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(direction, centroid(rows.sum(axis=0, dtype=np.float64), left + right), atol=1e-6)
    np.testing.assert_array_equal(counts, histogram(rows, direction))
    assert make_card(total, left + right, counts).count == left + right


def test_a_card_survives_json_bit_for_bit():
    card = of(texts(0, 50, axis(0)))
    again = Card.from_json(json.loads(json.dumps(card.to_json())))
    assert again == card
    assert again.vector.tobytes() == card.vector.tobytes()
    good = {"centroid": [1.0], "threshold": 0.0, "count": 1}
    assert Card.from_json(good).encoder == ""
    wrong = [{"count": -1}, {"threshold": "x"}, {"threshold": float("nan")}, {"centroid": 3}, {"centroid": []}, {"counts": [1.0]}]
    for bad in ({}, *({**good, **fault} for fault in wrong)):
        with pytest.raises(AdapterError, match="router card"):
            Card.from_json(bad)


@pytest.mark.parametrize(("total", "count"), [(np.zeros(D), 3), (np.ones(D), 0), (np.full(D, np.nan), 3)])
def test_a_card_needs_texts(total, count):
    with pytest.raises(AdapterError, match="a card needs texts"):
        centroid(total, count)


@pytest.mark.parametrize(("counts", "quantile"), [([1.0] * 3, 0.05), ([-1.0] * BINS, 0.05), ([1.0] * BINS, 1.5)])
def test_bad_histograms_are_refused(counts, quantile):
    with pytest.raises(AdapterError, match="router card"):
        calibrate(counts, quantile)


@pytest.fixture(scope="module")
def router():
    return CentroidRouter({name: of(texts(place, 400, axis(place))) for place, name in enumerate(("area", "kind", "verb"))})


def test_texts_go_to_their_task_and_one_in_twenty_to_the_base(router):
    for place, name in enumerate(router.cards):
        routes = router.route_all(texts(100 + place, 1000, axis(place)))
        share = np.mean([route.task == name for route in routes])
        assert 0.9 <= share <= 0.98
        assert {route.task for route in routes} <= {name, None}


def test_strangers_go_to_the_base(router):
    for row in texts(7, 50, axis(9)):
        route = router.route(Request.of(row))
        assert route.task is None
        assert set(route.scores) == set(router.cards)
        assert route.score == max(route.scores.values())


def test_scores_are_cosines_whatever_the_length(router):
    row = texts(3, 1, axis(1), 0.2)[0]
    short, long = router.route(Request.of(row)), router.route(Request.of(row * 37))
    assert short.task == long.task == "kind"
    for name, card in router.cards.items():
        assert short.scores[name] == pytest.approx(float(row @ card.vector), abs=1e-6)
        assert long.scores[name] == pytest.approx(short.scores[name], abs=1e-6)
    assert router.route(Request.of(np.zeros(D))).task is None


def test_a_task_whose_threshold_is_not_reached_gives_way_to_one_whose_is():
    near, far = Card(tuple(axis(0).tolist()), 0.99, 1), Card(tuple(axis(1).tolist()), 0.1, 1)
    row = np.array([0.9, 0.4] + [0.0] * (D - 2))
    assert CentroidRouter({"strict": near, "lenient": far}).route(Request.of(row)).task == "lenient"
    assert CentroidRouter({"strict": near}).route(Request.of(row)).task is None
    twins = CentroidRouter({"b": far, "a": far}).route(Request.of(axis(1)))
    assert (twins.task, twins.score) == ("a", 1.0)


def test_faults_are_named(router):
    with pytest.raises(AdapterError, match="an embedding has 3 values, the cards have 16"):
        router.route(Request.of(np.ones(3)))
    mixed = CentroidRouter({"a": Card((1.0,), 0.0, 1), "b": Card((1.0, 0.0), 0.0, 1)})
    with pytest.raises(AdapterError, match=r"cards differ in their number of values \{'a': 1, 'b': 2\}"):
        mixed.route(Request.of(np.ones(1)))
    assert CentroidRouter({}).route(Request.of(np.ones(3))).task is None


def test_the_task_router_takes_the_callers_word():
    router = TaskRouter(("area", "kind"))
    assert router.route(Request("kind")).task == "kind"
    with pytest.raises(AdapterError, match=r"task 'verb' is not served here; tasks are \['area', 'kind'\]"):
        router.route(Request("verb"))
    assert router.route(Request()).task is None
    assert all(kind == made.kind for kind, made in ROUTERS.items())
