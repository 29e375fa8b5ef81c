"""Merges against dense float64 oracles: products are added as products, never factor by factor (ALGORITHMS E.3, E.8)."""

from math import erf

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.adapters import Adapter
from fedpeft.bases import HeadSpec
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.merging import MERGES, FourSums, make_rule, merge, merged, ties_four_sums, trim
from fedpeft.tensors import Tensors

CAT = make_rule("cat")
ROOMY = {"svd": {"rank": 7}, "arithmetic": {"rank": 7}, "dare": {"rank": 7, "drop": 0.0}}
MODULES = ("base_model.model.x.q_proj", "base_model.model.x.v_proj")
LABELS = HeadSpec("classification", ("no", "yes"))
shared_fixture = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@shared_fixture
@given(
    seed=st.integers(0, 1000),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4),
    extra=st.integers(0, 3),
)
def test_cat_is_the_weighted_sum_of_the_weight_changes(seed, ranks, weights, extra, make, change):
    adapters = [make(seed=seed + i, r=r, extra=extra) for i, r in enumerate(ranks)]
    weights = weights[: len(ranks)]
    out = merge(adapters, weights, CAT)
    assert out.spec.method.r == sum(ranks) + extra * len(ranks)
    assert out.spec.method.extra == 0
    assert out.spec.method.scale == pytest.approx(adapters[0].spec.method.scale)
    for module in MODULES:
        wanted = sum(w * change(adapter, module) for w, adapter in zip(weights, adapters, strict=True))
        np.testing.assert_allclose(change(out, module), wanted, atol=1e-5 * (1 + np.abs(wanted).max()))


@pytest.mark.parametrize("kind", ROOMY)
def test_with_room_every_sum_is_exact(kind, make, change):
    adapters, weights = [make(seed=i, r=r) for i, r in enumerate((2, 4))], [0.25, -1.5]
    found = merged(adapters, weights, make_rule({"kind": kind, **ROOMY[kind]}))
    wanted = sum(w * change(adapter) for w, adapter in zip(weights, adapters, strict=True))
    np.testing.assert_allclose(change(found.adapter), wanted, atol=1e-4)
    assert found.lost < 1e-9


def test_svd_is_the_best_of_its_rank_and_states_what_it_lost(make, change):
    adapters = [make(seed=i, r=3) for i in range(3)]
    found = merged(adapters, [1.0, 1.0, 1.0], make_rule("svd"))
    assert found.adapter.spec.method.r == 3
    dropped = whole = 0.0
    for module in MODULES:
        values = np.linalg.svd(sum(change(adapter, module) for adapter in adapters), compute_uv=False)
        error = np.linalg.norm(sum(change(adapter, module) for adapter in adapters) - change(found.adapter, module))
        assert error == pytest.approx(np.linalg.norm(values[3:]), rel=1e-4)
        dropped, whole = dropped + error**2, whole + np.linalg.norm(values) ** 2
    assert found.lost == pytest.approx(dropped / whole, rel=1e-4)


def test_arithmetic_scales(make, change):
    adapters = [make(seed=i, r=2) for i in range(2)]
    out = merge(adapters, [1.0, 2.0], make_rule({"kind": "arithmetic", "scale": 0.3, "rank": 4}))
    np.testing.assert_allclose(change(out), 0.3 * (change(adapters[0]) + 2 * change(adapters[1])), atol=1e-5)


def slow_ties(vectors, weights, density):
    """Coordinate by coordinate, from a list, as the paper's algorithm 1 reads."""
    count, out = int(np.ceil(density * vectors[0].size)), np.zeros(vectors[0].size)
    floors = [sorted(np.abs(v).ravel())[-count] for v in vectors]
    for j in range(out.size):
        votes = [(w, v.flat[j]) for w, v, floor in zip(weights, vectors, floors, strict=True) if abs(v.flat[j]) >= floor]
        sign = 1 if sum(w * x for w, x in votes) >= 0 else -1
        agree = [(w, x) for w, x in votes if x * sign > 0]
        out[j] = sum(w * x for w, x in agree) / sum(w for w, _ in agree) if agree else 0.0
    return out.reshape(vectors[0].shape)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), tasks=st.integers(1, 6), density=st.sampled_from([0.1, 0.2, 0.5, 1.0]))
def test_ties_from_four_sums_is_ties_from_the_list_to_the_last_bit(seed, tasks, density):
    rng = np.random.default_rng(seed)
    vectors = [rng.integers(-64, 65, 40) / 16.0 for _ in range(tasks)]
    weights = rng.choice([0.5, 1.0, 2.0], tasks)
    terms = [FourSums.of(trim(v, density), w) for v, w in zip(vectors, weights, strict=True)]
    order = rng.permutation(tasks)
    total = terms[order[0]]
    for place in order[1:]:
        total += terms[place]
    assert np.abs(ties_four_sums(total) - slow_ties(vectors, weights, density)).max() == 0.0


def test_ties_on_lora_picks_among_the_entries_of_the_weight_change(make, change):
    adapters, weights = [make(seed=i, r=2) for i in range(3)], [1.0, 2.0, 1.0]
    found = merged(adapters, weights, make_rule({"kind": "ties", "density": 0.4, "scale": 0.5, "rank": 7}))
    wanted = 0.5 * slow_ties([change(adapter) for adapter in adapters], weights, 0.4)
    np.testing.assert_allclose(change(found.adapter), wanted, atol=1e-5)
    cut = merged(adapters, weights, make_rule({"kind": "ties", "density": 0.4, "rank": 1}))
    values = np.linalg.svd(2 * wanted, compute_uv=False)
    assert np.linalg.norm(change(cut.adapter) - 2 * wanted) == pytest.approx(np.linalg.norm(values[1:]), rel=1e-5)
    assert cut.lost > 0.1


def test_knots_is_ties_in_the_basis_of_the_dense_svd(make, change):
    adapters, weights = [make(seed=i, r=r) for i, r in enumerate((2, 1, 2))], [1.0, 0.5, 1.0]
    found = merged(adapters, weights, make_rule({"kind": "knots", "density": 0.5, "rank": 5}))
    u, values, vt = np.linalg.svd(np.concatenate([change(adapter) for adapter in adapters], axis=1), full_matrices=False)
    parts = [vt[:5, start : start + 10] for start in (0, 10, 20)]
    wanted = (u[:, :5] * values[:5]) @ slow_ties(parts, weights, 0.5)
    np.testing.assert_allclose(change(found.adapter), wanted, atol=1e-4)
    assert found.lost < 1e-9


def test_knots_of_one_adapter_or_of_equal_ones_is_that_adapter(make, change):
    adapter = make(r=3)
    for count in (1, 3):
        out = merge([adapter] * count, [1.0] * count, make_rule({"kind": "knots", "density": 1.0, "rank": 4}))
        np.testing.assert_allclose(change(out), change(adapter), atol=1e-4)
    zero = Adapter(adapter.spec, Tensors.zeros(adapter.spec.layout))
    assert not merge([zero, zero], [1.0, 1.0], make_rule("knots")).tensors.flat.any()


def test_dare_is_the_sum_on_average_and_a_function_of_its_seed(make, change):
    adapters, weights = [make(seed=i, r=2) for i in range(2)], [1.0, -0.5]
    wanted = sum(w * change(adapter) for w, adapter in zip(weights, adapters, strict=True))
    outs = [change(merge(adapters, weights, make_rule({"kind": "dare", "drop": 0.5, "seed": s, "rank": 4}))) for s in range(300)]
    spread = np.std(outs, axis=0) / np.sqrt(len(outs))
    assert (np.abs(np.mean(outs, axis=0) - wanted) <= 5 * spread + 1e-6).all()
    assert np.abs(outs[0] - outs[1]).max() > 0.1
    again = merge(adapters, weights, make_rule({"kind": "dare", "drop": 0.5, "seed": 0, "rank": 4}))
    assert (change(again) == outs[0]).all()
    twins = merge([adapters[0], adapters[0]], [1.0, -1.0], make_rule({"kind": "dare", "rank": 4}))
    assert np.abs(change(twins)).max() > 0.1


def test_stacked_bottlenecks_answer_with_the_weighted_sum(make):
    adapters, weights = [make("bottleneck", seed=i, dim=d) for i, d in enumerate((3, 1, 4))], [0.5, -1.0, 2.0]
    out = merge(adapters, weights, CAT)
    assert out.spec.method.dim == 8
    x = np.random.default_rng(9).standard_normal((5, 10))
    wanted = sum(w * answer(adapter, x) for w, adapter in zip(weights, adapters, strict=True))
    np.testing.assert_allclose(answer(out, x), wanted, atol=1e-5)


def answer(adapter, x):
    t = {name.split("bottleneck.")[1]: value.astype(np.float64) for name, value in adapter.tensors.named().items()}
    h = x @ t["down.weight"].T + t["down.bias"]
    return (h * 0.5 * (1 + np.vectorize(erf)(h / np.sqrt(2)))) @ t["up.weight"].T + t["up.bias"]


def test_attention_over_joined_prefixes_mixes_their_answers_by_their_scores(make):
    adapters = [make("prefix", seed=i, tokens=t) for i, t in enumerate((2, 3))]
    out = merge(adapters, [1.0, 1.0], CAT)
    assert out.spec.method.tokens == 5
    query = np.random.default_rng(9).standard_normal(10)
    parts = [attend(adapter, query) for adapter in adapters]
    mass = sum(m for _, m in parts)
    np.testing.assert_allclose(attend(out, query)[0], sum(v * m for v, m in parts) / mass, atol=1e-6)
    with pytest.raises(AdapterError, match="take no weights"):
        merge(adapters, [1.0, 0.5], CAT)


def attend(adapter, query):
    keys, values = np.split(adapter.tensors.named()["prompt_embeddings"].astype(np.float64), 2, axis=1)
    scores = np.exp(keys @ query)
    return scores @ values / scores.sum(), scores.sum()


def test_linear_methods_are_merged_as_task_vectors(make):
    adapters, weights = [make("ia3", seed=i) for i in range(3)], [1.0, 0.5, 1.0]
    flats = [adapter.tensors.flat.astype(np.float64) for adapter in adapters]
    out = merge(adapters, weights, make_rule({"kind": "arithmetic", "scale": 0.4}))
    np.testing.assert_allclose(out.tensors.flat, 1 + 0.4 * sum(w * (f - 1) for w, f in zip(weights, flats, strict=True)), atol=1e-6)
    out = merge(adapters, weights, make_rule({"kind": "ties", "density": 0.3}))
    np.testing.assert_allclose(out.tensors.flat, 1 + slow_ties([f - 1 for f in flats], weights, 0.3), atol=1e-6)
    assert out.spec.method == adapters[0].spec.method
    with pytest.raises(AdapterError, match="use ties"):
        merge(adapters, weights, make_rule("knots"))


def test_without_neutral_values_an_origin_is_asked_for(make):
    adapters, origin = [make("bitfit", seed=i) for i in range(2)], make("bitfit", seed=9)
    flats, start = [adapter.tensors.flat.astype(np.float64) for adapter in adapters], origin.tensors.flat.astype(np.float64)
    np.testing.assert_allclose(merge(adapters, [0.25, 0.75], CAT).tensors.flat, 0.25 * flats[0] + 0.75 * flats[1], atol=1e-6)
    for rule, weights in ((CAT, [1.0, 1.0]), (make_rule("ties"), [0.5, 0.5])):
        with pytest.raises(AdapterError, match="give the origin"):
            merge(adapters, weights, rule)
    out = merge(adapters, [1.0, 1.0], make_rule("arithmetic"), origin=origin)
    np.testing.assert_allclose(out.tensors.flat, flats[0] + flats[1] - start, atol=1e-5)
    with pytest.raises(AdapterError, match="another layout"):
        merge(adapters, [1.0, 1.0], CAT, origin=make("ia3"))


def test_sparse_changes_are_merged_where_their_positions_agree(make):
    one, two = (make("sparse-magnitude", seed=i) for i in range(2))
    with pytest.raises(AdapterError, match="differ in their 'index'"):
        merge([one, two], [1.0, 1.0], CAT)
    two = Adapter(two.spec, two.tensors.patch(one.tensors.pick({"index"})))
    out = merge([one, two], [1.0, -2.0], CAT)
    assert (out.tensors.pick({"index"}).flat == one.tensors.pick({"index"}).flat).all()
    deltas = [adapter.tensors.pick({"delta"}).flat for adapter in (one, two)]
    np.testing.assert_allclose(out.tensors.pick({"delta"}).flat, deltas[0] - 2 * deltas[1], atol=1e-6)


def test_heads_are_averaged_and_tasks_are_named(make):
    adapters = [make(seed=i, task=f"t{i}", head=LABELS, r=2) for i in range(2)]
    out = merge(adapters, [1.0, 3.0], CAT)
    heads = [adapter.tensors.pick({"head"}).flat for adapter in adapters]
    np.testing.assert_allclose(out.tensors.pick({"head"}).flat, 0.25 * heads[0] + 0.75 * heads[1], atol=1e-6)
    assert out.spec.task == "t0+t1"
    assert merge(adapters, [1.0, 1.0], CAT, task="both").spec.task == "both"
    with pytest.raises(AdapterError, match="no mean"):
        merge(adapters, [1.0, -1.0], CAT)


def test_what_cannot_be_merged_is_refused(make):
    one = make(r=2)
    for weights in ([1.0], [1.0, np.nan]):
        with pytest.raises(AdapterError, match="one finite weight"):
            merge([one, one], weights, CAT)
    with pytest.raises(AdapterError, match="differ in their method"):
        merge([one, make("ia3")], [1.0, 1.0], CAT)
    with pytest.raises(AdapterError, match="differ in their head"):
        merge([one, make(r=2, head=LABELS)], [1.0, 1.0], CAT)
    with pytest.raises(AdapterError, match="equal settings"):
        merge([make("sparse-magnitude"), make("sparse-magnitude", targets=("mlp",))], [0.5, 0.5], CAT)
    with pytest.raises(AdapterError, match="not defined for bottleneck"):
        merge([make("bottleneck", dim=2)] * 2, [1.0, 1.0], make_rule("svd"))
    with pytest.raises(AdapterError, match="positive weights"):
        merge([one, one], [1.0, -1.0], make_rule("ties"))
    for kind in ("linear", "dare_linear", "dare_ties"):
        with pytest.raises(ConfigError, match="adds up A and B apart"):
            make_rule(kind)
    with pytest.raises(ConfigError, match="known kinds are"):
        make_rule("mean")
    with pytest.raises(ConfigError, match="density"):
        make_rule({"kind": "ties", "density": 0.0})


@pytest.mark.parametrize("kind", MERGES)
def test_nothing_is_mutated_and_equal_calls_give_equal_adapters(kind, make):
    adapters = [make(seed=i, r=2) for i in range(2)]
    prints = [adapter.digest for adapter in adapters]
    assert merge(adapters, [1.0, 0.5], make_rule(kind)).digest == merge(adapters, [1.0, 0.5], make_rule(kind)).digest
    assert [adapter.digest for adapter in adapters] == prints
