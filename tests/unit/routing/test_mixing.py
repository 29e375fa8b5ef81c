"""Mixtures of whole requests: the nearest few, clusters, fitted weights, and policies that end at the base."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import AdapterError
from fedpeft.routing import (
    Calibrated,
    Card,
    CentroidRouter,
    Chain,
    ClusterRouter,
    FewShot,
    MeanRouter,
    Request,
    Route,
    RouterCard,
    TaskRouter,
    Within,
    make_card,
    make_router,
    thresholds,
)
from fedpeft.routing.cards import histogram
from fedpeft.routing.fewshot import MOST, nearest

D = 12
EYE = np.eye(D)


def card(place, threshold=0.3, **more):
    return Card(tuple(EYE[place].tolist()), threshold, 10, **more)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), top=st.integers(1, 6))
def test_the_nearest_few_share_the_answer_by_their_cosines(seed, top):
    row = np.abs(np.random.default_rng(seed).standard_normal(D))
    cards = {f"t{place}": card(place, 0.05 * place) for place in range(5)}
    route = CentroidRouter(cards, top, 0.2).route(Request.of(row))
    cosines = {name: float(row @ cards[name].vector / np.linalg.norm(row)) for name in cards}
    near = sorted((name for name in cards if cosines[name] >= cards[name].threshold), key=lambda name: -cosines[name])[:top]
    assert set(route.weights) == set(near)
    total = sum(np.exp(cosines[name] / 0.2) for name in near)
    for name in near:
        assert route.weights[name] == pytest.approx(np.exp(cosines[name] / 0.2) / total, rel=1e-9)
    assert route.task == near[0]


@given(scale=st.floats(1e-6, 1e6))
def test_a_loud_centroid_wins_nothing(scale):
    loud, quiet = Card(tuple((EYE[0] * scale).tolist()), 0.0, 1), card(1, 0.0)
    row = 0.8 * EYE[1] + 0.6 * EYE[0]
    assert CentroidRouter({"loud": loud, "quiet": quiet}).route(Request.of(row)).task == "quiet"


def test_cosines_of_two_encoders_are_never_compared():
    ours, theirs = card(0, encoder="base@aa"), card(1, encoder="minilm@bb")
    assert CentroidRouter({"a": ours}).route(Request.of(EYE[0], "base@aa")).task == "a"
    for router in (CentroidRouter({"a": ours}), ClusterRouter({"a": ours})):
        with pytest.raises(AdapterError, match=r"embedded by minilm@bb, the cards by \{'a': 'base@aa'\}"):
            router.route(Request.of(EYE[0], "minilm@bb"))
    with pytest.raises(AdapterError, match="one encoder"):
        CentroidRouter({"a": ours, "b": theirs}).route(Request.of(EYE[0]))


def test_a_cluster_answers_as_its_mean_and_further_out_than_its_tasks():
    rng = np.random.default_rng(0)
    cards = {}
    for place, name in enumerate(("a", "b", "c")):
        rows = EYE[place] + 0.4 * rng.standard_normal((500, D))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        direction = rows.sum(0) / np.linalg.norm(rows.sum(0))
        cards[name] = make_card(rows.sum(0), 500, histogram(rows, direction))
    router, strict = ClusterRouter(cards, (("a", "b"),)), CentroidRouter(cards)
    assert all(cards[name].loosened(0.01) < cards[name].threshold for name in cards)
    assert router.route(Request.of(EYE[0])).weights == {"a": 0.5, "b": 0.5}
    assert router.route(Request.of(EYE[2])).weights == {"c": 1.0}
    edge = (cards["a"].threshold + cards["a"].loosened(0.01)) / 2
    between = edge * cards["a"].vector + np.sqrt(1 - edge**2) * np.linalg.qr(np.column_stack([cards["a"].vector, EYE[9]]))[0][:, 1]
    assert strict.route(Request.of(between)).task is None
    assert router.route(Request.of(between)).weights == {"a": 0.5, "b": 0.5}
    assert router.route(Request.of(-EYE[0])).weights == {}


class Says:
    """A router that answers as told and counts how often it was asked."""

    def __init__(self, kind, weights, scores=None):
        self.kind, self.given, self.scores, self.asked = kind, weights, scores or {}, 0

    def route(self, request):
        self.asked += 1
        return Route(self.given, max(self.scores.values(), default=0.0), self.scores, self.kind, f"{self.kind} says so")


def test_a_chain_asks_in_order_and_stops_at_the_first_that_knows():
    first, second, third = Says("one", {}, {"a": 0.1}), Says("two", {"b": 1.0}), Says("three", {"c": 1.0})
    found = Chain((first, second, third)).route(Request())
    assert (found.task, found.router) == ("b", "two")
    assert found.why == "one: one says so; two says so"
    assert (first.asked, second.asked, third.asked) == (1, 1, 0)
    nobody = Chain((first,)).route(Request())
    assert (nobody.task, nobody.router, nobody.scores) == (None, "base", {"a": 0.1})
    assert Chain().route(Request()).weights == {}


def test_out_of_scope_is_settled_before_adapters_are_told_apart():
    inner = Says("arrow", {"a": 1.0})
    router = Within(inner, {"a": card(0, 0.5)})
    assert router.route(Request.of(0.6 * EYE[0] + 0.8 * EYE[1])).router == "arrow"
    away = router.route(Request.of(0.4 * EYE[0] + 0.9 * EYE[1]))
    assert (away.weights, inner.asked) == ({}, 1)


def test_a_chain_of_cards_asks_what_can_abstain_and_ends_at_the_base():
    flat = tuple([0.0] * 40 + [10.0] + [0.0] * 23)
    seen = RouterCard(card(0, 0.9, counts=flat), arrows={"m": EYE[3].astype(np.float32)}, counts={"arrow": flat})
    chain = make_router("chain", {"a": seen})
    near = 0.5 * EYE[0] + np.sqrt(0.75) * EYE[1]
    for place, found in ((3, "arrow"), (4, "cluster")):  # what the tokens read lies on the adapter's direction, or not
        request = Request(embed=lambda: near, watch=lambda place=place: {"m": EYE[[place]].astype(np.float32)})
        assert chain.route(request).router == found
    assert chain.route(Request.of(EYE[5])).router == "base"
    silent = make_router("chain", {"a": RouterCard(seen.card, arrows=seen.arrows)})
    assert silent.route(Request.of(near)).router == "cluster"  # an Arrow that could never abstain is left out


def test_a_chain_computes_only_what_is_looked_at():
    def never():
        raise AssertionError("a named request is never embedded")

    chain = Chain((TaskRouter(("a",)), CentroidRouter({"a": card(0)})))
    assert chain.route(Request("a", embed=never, watch=never)).router == "task"
    assert chain.route(Request(embed=lambda: EYE[0], watch=never)).router == "centroid"
    assert chain.route(Request(embed=lambda: EYE[5], watch=never)).router == "base"
    with pytest.raises(AdapterError, match="task 'b' is not served here"):
        chain.route(Request("b", embed=never))
    with pytest.raises(AdapterError, match="no embedding"):
        chain.route(Request())


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), quantile=st.floats(0.0, 0.5))
def test_calibration_sends_its_quantile_of_training_requests_to_the_base(seed, quantile):
    rng = np.random.default_rng(seed)
    rows = [Request.of(EYE[0] + rng.uniform(0, 2) * EYE[1]) for _ in range(200)]
    open_ = CentroidRouter({"a": card(0, -1.0)})
    least = thresholds(open_, {"a": rows}, quantile)
    router = Calibrated(open_, least)
    away = np.mean([router.route(row).task is None for row in rows])
    scores = np.array([open_.route(row).score for row in rows])
    in_bin = np.mean(np.floor((scores + 1) * 32) == np.floor((least["a"] + 1) * 32))
    assert abs(away - quantile) <= in_bin + 1e-9
    with pytest.raises(AdapterError, match="no scores of task 'z'"):
        thresholds(open_, {"z": rows})


def test_without_a_threshold_nothing_abstains():
    router = Calibrated(MeanRouter(("a", "b")), {"b": 0.9})
    assert router.route(Request()).weights == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize("how", ["search", "gradient"])
def test_few_shot_weights_beat_the_uniform_mean(how):
    rng = np.random.default_rng(5)
    parts = rng.standard_normal((6, 40))
    wanted = 0.9 * parts[1] - 0.4 * parts[4]

    def slope(weights):
        left = weights @ parts - wanted
        return float(left @ left) / 40, 2 * parts @ left / 40

    names, uniform = [f"t{place}" for place in range(6)], np.full(6, 1 / 6)
    fit = FewShot(evaluations=150, l1=0.01, how=how)
    found = fit.fit(names, lambda weights: slope(weights)[0], slope)
    weights = np.array([found.mixture[name] for name in names])
    assert slope(weights)[0] < 0.2 * slope(uniform)[0]
    assert found.route(Request()).task == "t1"
    assert found == fit.fit(names, lambda weights: slope(weights)[0], slope)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_few_shot_weights_are_never_worse_than_the_uniform_mean_on_their_rows(seed):
    curve = np.random.default_rng(seed).standard_normal((3, 3))
    fit = FewShot(evaluations=9)

    def loss(weights):
        return float(np.sin(3 * curve @ weights).sum())

    found = np.array(list(fit.fit(["a", "b", "c"], loss).mixture.values()))
    uniform = np.full(3, 1 / 3)
    assert loss(found) + fit.penalty(found) <= loss(uniform) + fit.penalty(uniform) + 1e-12
    assert np.abs(found).max() <= fit.bound


def test_few_shot_faults_are_named():
    with pytest.raises(AdapterError, match="21 adapters; 1 to 20"):
        FewShot().fit([str(place) for place in range(MOST + 1)], lambda _w: 0.0)
    with pytest.raises(AdapterError, match="needs the loss's gradient"):
        FewShot(how="gradient").fit(["a"], lambda _w: 0.0)
    with pytest.raises(AdapterError, match="finite for no mixture"):
        FewShot(evaluations=5).fit(["a", "b"], lambda _w: float("nan"))
    assert nearest({"a": 0.1, "b": 0.9, "c": 0.5}, 2) == ("b", "c")
