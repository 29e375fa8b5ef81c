"""FlexLoRA, FedEx-LoRA, FLoRA: the whole product moves to the mean of the sites' products, up to what is reported as lost."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.schemes import SGD, FedEx, FlexLoRA, FLoRA, Gathers, Masks, Momentum, Part, Reports, SiteContext
from fedpeft.tensors import Entry, Layout, Tensors

EVERY = [FlexLoRA(), FedEx(), FLoRA()]
FOLDS = EVERY[1:]
COHORTS = st.tuples(st.integers(0, 2**32 - 1), st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6), st.booleans())


def layout_of(out=9, inner=12, rank=6, extra=9, modules=("k", "q")):
    entries = [Entry("head", "score.weight", (2, 3))]
    for m in modules:
        entries += [Entry("A", f"{m}.lora_A.weight", (rank, inner)), Entry("B", f"{m}.lora_B.weight", (out, rank))]
        if extra:
            entries += [Entry("A2", f"{m}.lora_A2.weight", (extra, inner)), Entry("B2", f"{m}.lora_B2.weight", (out, extra))]
    return Layout.of(entries)


def whole(tensors, module="q"):
    """B A + B2 A2 in float64."""
    named = {name: value.astype(np.float64) for name, value in tensors.named().items()}
    pairs = [("B", "A"), ("B2", "A2")] if f"{module}.lora_B2.weight" in named else [("B", "A")]
    return sum(named[f"{module}.lora_{b}.weight"] @ named[f"{module}.lora_{a}.weight"] for b, a in pairs)


def cohort(layout, draw, seed, count, mixed=False, drift=0.3):
    """A start with an empty fold, and where ``count`` sites ended; with ``mixed`` each trained a rank of its own, other slots zero."""
    rng = np.random.default_rng(seed)
    start = draw(layout, rng)
    start = start.patch(Tensors.zeros(layout.subset({"B2"})))
    sites = [start.patch((start + draw(layout, rng, drift)).pick({"A", "B", "head"})) for _ in range(count)]
    for site in sites if mixed else ():
        rank = int(rng.integers(1, 7))
        for name, value in site.named().items():
            if "lora_A." in name:
                value[rank:] = 0.0
            elif "lora_B." in name:
                value[:, rank:] = 0.0
    return start, sites


def play(scheme, start, sites, weights, optimizer=None, state=None):
    phase = scheme.phase(1, start.layout)
    moves = [scheme.contribution(start, site, phase, SiteContext(0)) for site in sites]
    mean = scheme.gather(start, [Part(w, m) for w, m in zip(weights, moves, strict=True)], phase)
    after, state = scheme.advance(start, mean, phase, optimizer or SGD(), state or {})
    return after, scheme.drift(start, mean, phase), state


def mean_of(sites, weights, module="q"):
    return sum(w * whole(site, module) for w, site in zip(weights, sites, strict=True)) / sum(weights)


@settings(max_examples=40)
@given(cohort_of=COHORTS)
def test_without_truncation_all_three_agree_with_the_mean_of_the_products(cohort_of, draw):
    seed, weights, mixed = cohort_of
    full, folded = layout_of(rank=9, extra=0), layout_of()
    results = {}
    for scheme, layout in ((EVERY[0], full), (EVERY[1], folded), (EVERY[2], folded)):
        start, sites = cohort(folded, draw, seed, len(weights), mixed)
        if layout is full:
            start, *sites = (padded(x, full) for x in (start, *sites))
        after, lost, _ = play(scheme, start, sites, weights)
        assert 0.0 <= lost["lost"] < 1e-9
        for module in ("q", "k"):
            wanted = mean_of(sites, weights, module)
            assert np.linalg.norm(whole(after, module) - wanted) <= 1e-5 * np.linalg.norm(wanted)
            results.setdefault(module, []).append(whole(after, module))
        head = sum(w * s.pick({"head"}).flat.astype(np.float64) for w, s in zip(weights, sites, strict=True)) / sum(weights)
        np.testing.assert_allclose(after.pick({"head"}).flat, head, atol=2e-6)
    for flex, fedex, flora in results.values():
        size = np.linalg.norm(flex)
        assert max(np.linalg.norm(flex - fedex), np.linalg.norm(flex - flora), np.linalg.norm(fedex - flora)) <= 1e-5 * size


def padded(tensors, layout):
    """The same adapter with more slots and no fold (which is empty)."""
    out = Tensors.zeros(layout)
    for name, value in out.named().items():
        known = tensors.named()[name]
        value[tuple(slice(n) for n in known.shape)] = known
    return out


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 6))
def test_what_is_truncated_is_the_best_and_is_reported(seed, count, draw):
    layout, weights = layout_of(rank=2, extra=3, modules=("q",)), [1.0] * count
    start, sites = cohort(layout, draw, seed, count)
    target = mean_of(sites, weights)
    for scheme in EVERY:
        after, lost, _ = play(scheme, start, sites, weights)
        kept = {"flexlora": (target, 2), "flora": (target, 3), "fedex": (target - product_of_means(sites), 3)}[scheme.kind]
        values = np.linalg.svd(kept[0], compute_uv=False)
        gone = np.linalg.norm(values[kept[1] :])
        assert np.linalg.norm(whole(after) - target) == pytest.approx(gone, abs=2e-6 * np.linalg.norm(values))
        assert lost["lost"] == pytest.approx(gone**2 / np.linalg.norm(values) ** 2, abs=1e-5)


def product_of_means(sites):
    named = [site.named() for site in sites]
    b, a = (np.mean([n[f"q.lora_{f}.weight"].astype(np.float64) for n in named], axis=0) for f in "BA")
    return b @ a


@pytest.mark.parametrize("scheme", EVERY, ids=lambda scheme: scheme.kind)
def test_a_square_layer_that_is_not_symmetric_keeps_its_orientation(scheme, draw):
    layout = layout_of(out=48, inner=48, rank=48, extra=48, modules=("q",))
    start, sites = cohort(layout, draw, 1, 3)
    after, _, _ = play(scheme, start, sites, [1.0, 2.0, 1.0])
    wanted = mean_of(sites, [1.0, 2.0, 1.0])
    assert np.linalg.norm(whole(after) - wanted) <= 1e-5 * np.linalg.norm(wanted)
    assert np.linalg.norm(whole(after) - wanted.T) > np.linalg.norm(wanted)


@pytest.mark.parametrize("scheme", FOLDS, ids=lambda scheme: scheme.kind)
def test_a_fold_fills_up_over_rounds_and_says_what_it_drops(scheme, draw):
    layout, rng, losses = layout_of(rank=2, extra=4, modules=("q",)), np.random.default_rng(0), []
    current, _ = cohort(layout, draw, 0, 1)
    for _ in range(4):
        sites = [current.patch((current + draw(layout, rng, 0.3)).pick({"A", "B", "head"})) for _ in range(2)]
        after, lost, _ = play(scheme, current, sites, [1.0, 1.0])
        losses.append(lost["lost"])
        error, size = np.linalg.norm(whole(after) - mean_of(sites, [1.0, 1.0])), np.linalg.norm(whole(after))
        assert (error <= 1e-5 * size) == (lost["lost"] < 1e-9)
        current = after
    assert losses[0] < 1e-9
    assert losses[-1] > 1e-4


def test_flora_starts_anew_from_public_values(draw):
    layout, scheme = layout_of(), FLoRA()
    start, sites = cohort(layout, draw, 3, 3)
    after, _, _ = play(scheme, start, sites, [1.0] * 3)
    again, _, _ = play(scheme, start, sites[:2], [1.0] * 2)
    assert not after.pick({"B"}).flat.any()
    np.testing.assert_allclose(after.pick({"A"}).flat, again.pick({"A"}).flat, atol=1e-6)
    a = after.named()["q.lora_A.weight"]
    assert np.abs(a).max() <= 12**-0.5 + 1e-6
    assert np.abs(a).mean() == pytest.approx(12**-0.5 / 2, rel=0.3)
    assert np.abs(a - after.named()["k.lora_A.weight"]).max() > 0.1
    other, _, _ = play(FLoRA(seed=1), start, sites, [1.0] * 3)
    later, _, _ = play(scheme, after, [after], [1.0])
    for fresh in (other, later):
        assert np.abs(fresh.named()["q.lora_A.weight"] - a).max() > 0.1


def test_flexlora_orders_its_slots_and_leaves_none_dead(draw):
    layout = layout_of(rank=4, extra=0, modules=("q",))
    start, sites = cohort(layout, draw, 4, 1)
    for name, value in sites[0].named().items():
        if "lora_B" in name:
            value[:, 2:] = 0.0
    after, _, _ = play(FlexLoRA(), start, sites, [0.5])
    b, a = after.named()["q.lora_B.weight"], after.named()["q.lora_A.weight"]
    sizes = np.linalg.norm(b, axis=0)
    assert sizes[0] >= sizes[1] > 0.0
    np.testing.assert_allclose(sizes[2:], 0.0, atol=1e-6)
    np.testing.assert_allclose(a[2:], start.named()["q.lora_A.weight"][2:], atol=1e-6)
    np.testing.assert_allclose(sizes[:2], np.linalg.norm(a[:2], axis=1), rtol=1e-5)


@pytest.mark.parametrize("scheme", EVERY, ids=lambda scheme: scheme.kind)
def test_a_small_site_trains_some_slots_and_computes_with_all(scheme, draw):
    layout = layout_of()
    phase = scheme.phase(1, layout)
    assert isinstance(scheme, Masks)
    assert scheme.mask(layout, phase, SiteContext(1, "x")) is None
    mask = Tensors(layout.subset(phase.trains), scheme.mask(layout, phase, SiteContext(1, "x", rank=2)).astype(np.float32)).named()
    assert mask["score.weight"].all()
    rows, columns = mask["q.lora_A.weight"], mask["q.lora_B.weight"]
    assert (rows.all(axis=1) == rows.any(axis=1)).all()
    assert (columns.all(axis=0) == rows.all(axis=1)).all()
    assert rows.all(axis=1).sum() == 2


@pytest.mark.parametrize("scheme", EVERY, ids=lambda scheme: scheme.kind)
def test_the_server_optimizer_moves_what_is_a_mean_and_nothing_else(scheme, draw):
    layout = layout_of()
    start, sites = cohort(layout, draw, 6, 2)
    plain, _, _ = play(scheme, start, sites, [1.0, 1.0])
    after, _, state = play(scheme, start, sites, [1.0, 1.0], Momentum(lr=0.5))
    assert {key.partition(".")[0] for key in state} == {"head"}
    for role in ("A", "B", "A2", "B2"):
        assert after.pick({role}).digest == plain.pick({role}).digest
    step = plain.pick({"head"}) - start.pick({"head"})
    np.testing.assert_allclose(after.pick({"head"}).flat, (start.pick({"head"}) + step.scaled(0.5)).flat, atol=1e-6)


@pytest.mark.parametrize("scheme", EVERY, ids=lambda scheme: scheme.kind)
def test_no_matrix_of_the_layer_s_size_is_ever_formed(scheme, draw):
    layout = layout_of(out=6000, inner=6000, rank=2, extra=4, modules=("q",))
    start, sites = cohort(layout, draw, 8, 3)
    tracemalloc.start()
    play(scheme, start, sites, [1.0] * 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6000 * 6000


def test_claims(layouts):
    assert all(isinstance(scheme, Gathers) and isinstance(scheme, Reports) and not scheme.sum_only for scheme in EVERY)
    for scheme in FOLDS:
        with pytest.raises(UpdateError, match=r"method\.extra"):
            scheme.check(layouts["lora"])
        scheme.check(layouts["double"])
        assert scheme.phase(3, layouts["double"]).settles == {"A2", "B2"}
        assert scheme.phase(3, layouts["double"]).trains == {"A", "B", "head", "bias"}
        assert not scheme.exact(layouts["double"])
        assert scheme.exact(layout_of(extra=9))
    assert FlexLoRA().phase(1, layouts["double"]).moves == {"A", "B", "head", "bias"}
    assert not FlexLoRA().exact(layouts["lora"])
    assert FlexLoRA().exact(layout_of(rank=9, extra=0))
    for name in ("ia3", "core", "prompt"):
        with pytest.raises(UpdateError, match=r"method\.kind"):
            FlexLoRA().check(layouts[name])


@pytest.mark.parametrize("scheme", EVERY, ids=lambda scheme: scheme.kind)
def test_faults_are_named(scheme, draw):
    layout = layout_of()
    start, sites = cohort(layout, draw, 2, 2)
    phase = scheme.phase(1, layout)
    with pytest.raises(UpdateError, match="no site contributed"):
        scheme.gather(start, [], phase)
    with pytest.raises(UpdateError, match="another layout"):
        scheme.gather(start, [Part(1.0, start)], phase)
    broken = scheme.contribution(start, sites[0], phase, SiteContext(0))
    broken.flat[5] = np.inf
    with pytest.raises(UpdateError, match="not finite"):
        scheme.gather(start, [Part(1.0, broken)], phase)
    with pytest.raises(UpdateError, match="another round"):
        scheme.advance(start, start.pick({"A"}), phase, SGD(), {})
    with pytest.raises(UpdateError, match="round 0"):
        scheme.phase(0, layout)
    mean = scheme.gather(start, [Part(1.0, scheme.contribution(start, sites[0], phase, SiteContext(0)))], phase)
    assert scheme.drift(start, Tensors(mean.layout, mean.flat), phase) == {}
