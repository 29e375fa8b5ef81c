"""Routers over tokens: what they weigh, that loudness wins nothing, and that a card's file brings the same routers back."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fedpeft.errors import AdapterError
from fedpeft.routing import ArrowRouter, Card, GateRouter, Request, RouterCard, SpectrRouter, derive
from fedpeft.routing.cardfile import HEAD, lora_products
from fedpeft.routing.prototypes import arrow, gate_scores, spectrum, top
from fedpeft.tensors import Entry, Layout, Tensors

SEEDS = st.integers(0, 2**32 - 1)
MODULES = ("layers.0.q_proj", "layers.1.q_proj")
M, N, R = 7, 9, 3


def adapter(rng, loud=1.0, rank=R):
    """LoRA tensors of two modules under PEFT's names."""
    entries = [
        Entry(role, f"base_model.model.{module}.lora_{role}.weight", shape)
        for module in MODULES
        for role, shape in (("A", (rank, N)), ("B", (M, rank)))
    ]
    layout = Layout.of(entries)
    tensors = Tensors(layout, rng.standard_normal(layout.size).astype(np.float32))
    return tensors.patch(tensors.pick(["B"]).scaled(loud))


def cards(rng, loud=1.0):
    return {name: derive(adapter(rng, loud if name == "c" else 1.0), gates=dict.fromkeys(MODULES, draw(rng, N))) for name in "abc"}


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def routers(made, k=2):
    return (
        GateRouter({name: card.gates for name, card in made.items()}, k),
        ArrowRouter({name: card.arrows for name, card in made.items()}, k),
        SpectrRouter({name: card.spectra for name, card in made.items()}, k),
    )


@settings(max_examples=25)
@given(seed=SEEDS, k=st.integers(1, 5))
def test_token_weights_are_those_of_the_papers(seed, k):
    rng = np.random.default_rng(seed)
    whole = {name: adapter(rng) for name in "abc"}
    gates = {name: dict.fromkeys(MODULES, draw(rng, N)) for name in "abc"}
    made = {name: derive(tensors, gates=gates[name]) for name, tensors in whole.items()}
    x, module = draw(rng, 6, N), MODULES[1]
    gate, arrows, spectr = (router.weigher(module)(x) for router in routers(made, k))
    kept = min(k, 3)
    assert np.allclose(gate, top(gate_scores(np.stack([gates[name][module] for name in "abc"]), x), kept), atol=1e-6)
    dense = [product.b.astype(float) @ product.a for product in (lora_products(whole[name])[module] for name in "abc")]
    first = np.stack([np.linalg.svd(w)[2][0] for w in dense])
    assert np.allclose(arrows, top(np.abs(x @ first.T).astype(np.float32), kept), atol=1e-4)
    strength = np.stack([np.linalg.norm(x @ w.T, axis=1) / np.linalg.svd(w)[1][0] for w in dense], 1)
    best = np.argsort(-strength, axis=1)[:, :kept]
    assert np.allclose(np.take_along_axis(spectr, best, 1), 1 / kept)
    assert np.allclose(spectr.sum(axis=1), 1.0)


@settings(max_examples=25)
@given(seed=SEEDS, loud=st.floats(0.01, 1000.0))
def test_the_loudest_adapter_wins_nothing(seed, loud):
    x = {module: draw(np.random.default_rng(1), 5, N) for module in MODULES}
    quiet, noisy = (cards(np.random.default_rng(seed), size) for size in (1.0, loud))
    noisy["c"] = derive(adapter_of(seed, loud), gates={m: g * np.float32(loud) for m, g in quiet["c"].gates.items()})
    for one, other in zip(routers(quiet), routers(noisy), strict=True):
        before, after = (router.route(Request(watch=lambda: x)) for router in (one, other))
        assert before.scores == pytest.approx(after.scores, abs=1e-4)
        assert before.weights == pytest.approx(after.weights, abs=1e-3)
        assert before.level == "token"


def adapter_of(seed, loud):
    """The tensors of ``c`` in `cards`."""
    rng = np.random.default_rng(seed)
    for _ in "ab":
        adapter(rng), draw(rng, N)
    return adapter(rng, loud)


def test_taken_as_published_spectr_follows_the_loudest():
    rng = np.random.default_rng(2)
    made, x = {name: derive(adapter(rng, 50.0 if name == "c" else 1.0)) for name in "abc"}, draw(rng, 20, N)
    spectra = {name: card.spectra for name, card in made.items()}
    raw = SpectrRouter(spectra, 1, unit=False).weigher(MODULES[0])(x)
    assert raw[:, 2].all()
    assert not SpectrRouter(spectra, 1).weigher(MODULES[0])(x)[:, 2].all()


@settings(max_examples=20)
@given(seed=SEEDS)
def test_prototypes_do_not_know_the_gauge_and_scores_not_the_scale_of_tokens(seed):
    rng = np.random.default_rng(seed)
    tensors = adapter(rng)
    gauge = np.eye(R) + 0.2 * rng.standard_normal((R, R))
    named = {name: values @ np.linalg.inv(gauge) if "lora_B" in name else gauge @ values for name, values in tensors.named().items()}
    one, two = derive(tensors), derive(Tensors.from_named(tensors.layout, named))
    x = draw(rng, 4, N)
    for module in MODULES:
        assert np.allclose(np.abs(x @ one.arrows[module]), np.abs(x @ two.arrows[module]), atol=2e-2)
        assert np.allclose(np.linalg.norm(x @ one.spectra[module].T, axis=1), np.linalg.norm(x @ two.spectra[module].T, axis=1), rtol=1e-3)
    for router in routers(cards(rng)):
        assert np.allclose(router.measure(MODULES[0], x), router.measure(MODULES[0], 40 * x), atol=1e-5)
        assert (np.abs(router.measure(MODULES[0], x)) <= 1 + 1e-5).all()


def test_an_adapter_without_a_module_weighs_nothing_there():
    rng = np.random.default_rng(0)
    full, part = derive(adapter(rng)), derive(adapter(rng))
    made = {"full": full.arrows, "part": {MODULES[0]: part.arrows[MODULES[0]]}, "none": {}}
    router = ArrowRouter(made, 3)
    x = draw(rng, 4, N)
    assert (router.weigher(MODULES[1])(x) == [[1.0, 0.0, 0.0]]).all()  # names are sorted: full, none, part
    both = router.weigher(MODULES[0])(x)
    assert (both[:, 1] == 0).all()
    assert (both[:, [0, 2]] > 0).all()
    route = router.route(Request(watch=lambda: {MODULES[0]: x, MODULES[1]: x}))
    assert route.scores["none"] == 0.0
    assert set(route.weights) == {"full", "part"}
    with pytest.raises(AdapterError, match="states of"):
        router.route(Request(watch=lambda: {"other": x}))
    with pytest.raises(AdapterError, match="no hidden states"):
        router.route(Request())


def test_a_card_survives_its_file_and_equal_cards_give_equal_bytes():
    rng = np.random.default_rng(4)
    card = Card((0.6, 0.8), 0.25, 9, "base@ab", tuple(map(float, range(64))))
    tensors, gates = adapter(rng), {MODULES[0]: draw(rng, N)}
    made = derive(tensors, card, gates, {"gate": [1.0] * 64})
    data = made.to_bytes()
    again = RouterCard.from_bytes(data)
    assert data == derive(tensors, card, gates, {"gate": [1.0] * 64}).to_bytes()
    assert (again.card, again.scales, again.counts) == (card, made.scales, made.counts)
    for module in MODULES:
        product = lora_products(tensors)[module]
        assert again.arrows[module].tobytes() == made.arrows[module].tobytes()
        assert np.allclose(again.arrows[module], arrow(product), atol=1e-6)
        assert np.allclose(again.spectra[module], spectrum(product), atol=2e-3 * again.scales[module].largest)
        assert again.scales[module].frobenius == pytest.approx(np.linalg.norm(product.b @ product.a), rel=1e-5)
        assert again.scales[module].largest == pytest.approx(np.linalg.norm(product.b @ product.a, 2), rel=1e-5)
    assert again.gates[MODULES[0]].tobytes() == gates[MODULES[0]].tobytes()


def test_adapters_without_a_product_have_cards_without_prototypes():
    rng = np.random.default_rng(0)
    silent = adapter(rng, 0.0)
    assert derive(silent).arrows == {}
    assert all(scale.largest == 0.0 for scale in derive(silent).scales.values())
    scales = Tensors.zeros(Layout.of([Entry("ia3", "base_model.model.x.ia3_l", (4,))]))
    again = RouterCard.from_bytes(derive(scales).to_bytes())
    assert (again.card, again.arrows, again.scales) == (None, {}, {})


def fault_of(data):
    """What is said of a file that is no card."""
    try:
        return f"{RouterCard.from_bytes(data)}: a router card"
    except AdapterError as fault:
        return str(fault)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_card_is_named_and_nothing_worse(data):
    whole = derive(adapter(np.random.default_rng(0)), Card((1.0, 0.0), 0.1, 3)).to_bytes()
    torn = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if torn:
            torn[data.draw(st.integers(0, len(torn) - 1))] = data.draw(st.integers(0, 255))
    assert "router" in fault_of(bytes(torn))


HEADS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.just("format"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["card", "scales", "counts", "format", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=150)
@given(head=HEADS, card=HEADS, scales=HEADS, counts=HEADS)
def test_a_card_that_lies_is_named_and_nothing_worse(head, card, scales, counts):
    for table in (head, {"format": 1, "card": card, "scales": scales, "counts": counts}):
        data = save({HEAD: np.frombuffer(json.dumps(table).encode(), np.uint8), "arrow/m": np.ones(3, np.float32)})
        assert "router" in fault_of(data)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("arrow/m", np.full(3, np.nan, np.float32)),
        ("arrow/m", np.ones((2, 2), np.float32)),
        ("arrow/m", np.ones(3, np.float64)),
        ("spectrum/m", np.ones((2, 2), np.float16)),
        ("evil/m", np.ones(3, np.float32)),
        ("gate/", np.ones(3, np.float32)),
    ],
)
def test_tensors_that_no_card_has_are_refused(name, values):
    head = json.dumps({"format": 1, "card": None, "scales": {}, "counts": {}}).encode()
    with pytest.raises(AdapterError, match=r"router\.safetensors"):
        RouterCard.from_bytes(save({HEAD: np.frombuffer(head, np.uint8), name: values}))
