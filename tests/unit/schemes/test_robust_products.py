"""Inner products in factors are those of the dense products, in every phase of every scheme."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from tests.unit.schemes.parts import BOTH, PHASES, SEEDS, apart, dense, drawn

from fedpeft.errors import UpdateError
from fedpeft.schemes import SCHEMES, Alternating, Part, Phase
from fedpeft.schemes.robust import (
    RFA,
    Bulyan,
    Krum,
    Median,
    NormBound,
)
from fedpeft.schemes.robust.geometry import distances, gram, growth, metric
from fedpeft.tensors import Entry, Layout, Tensors


@pytest.mark.parametrize(("name", "phase"), PHASES)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_inner_products_in_factors_are_those_of_the_dense_products(layouts, draw, name, phase, seed):
    current, parts = drawn(layouts[name], phase, 5, draw, seed)
    measure, values = metric(current, phase), [part.values for part in parts]
    oracle = dense(current, phase, parts)
    table = oracle @ oracle.T
    np.testing.assert_allclose(gram(measure, values), table, rtol=0, atol=2e-6 * table.max())
    np.testing.assert_allclose(gram(measure, values, np.float64), table, rtol=0, atol=1e-12 * table.max())
    np.testing.assert_allclose(distances(measure, values), apart(oracle), rtol=0, atol=4e-6 * table.max())
    coefficients = growth(measure, values)
    for s in (0.3, 1.0, 2.5):
        lengths = np.square(dense(current, phase, parts, s)).sum(axis=1)
        np.testing.assert_allclose(coefficients @ [s**2, s**3, s**4], lengths, rtol=1e-9)


def test_distances_of_close_parts_keep_their_digits(layouts, draw):
    current, parts = drawn(layouts["lora"], Alternating().phase(1, layouts["lora"]), 4, draw)
    phase = Alternating().phase(1, layouts["lora"])
    near = [Tensors(p.values.layout, parts[0].values.flat + np.float32(1e-4) * p.values.flat) for p in parts]
    oracle = apart(dense(current, phase, [Part(1.0, value) for value in near]))
    np.testing.assert_allclose(distances(metric(current, phase), near), oracle, rtol=1e-6)


def test_a_factor_s_gauge_does_not_matter(layouts, draw):
    """(B G, G^-1 A) is the same adapter: its parts have the same distances."""
    layout = layouts["lora"]
    current, parts = drawn(layout, BOTH, 5, draw)
    gauge = {"q": np.random.default_rng(1).standard_normal((3, 3)) + 3 * np.eye(3), "v": np.array([[2.0, 1.0], [0.5, -1.0]])}

    def turned(named):
        out = {}
        for name, value in named.items():
            g = gauge.get(name[0])
            out[name] = value @ g if "lora_B" in name else np.linalg.solve(g, value) if "lora_A" in name else value
        return out

    moved = Tensors.from_named(layout, turned(current.named()))
    same = [Tensors.from_named(layout, turned(part.values.named())) for part in parts]
    here = distances(metric(current, BOTH), [part.values for part in parts])
    np.testing.assert_allclose(distances(metric(moved, BOTH), same), here, rtol=1e-4)


def test_a_factor_whose_partner_stays_at_the_sites_is_measured_as_it_is(layouts, draw):
    """FedSA: every site has a B of its own, and the coordinator's is zero."""
    layout = layouts["lora"]
    phase = Phase("A", frozenset({"A", "head", "bias"}), private=frozenset({"B"}))
    current, parts = drawn(layout, phase, 5, draw)
    current = current.patch(Tensors.zeros(layout.subset({"B"})))
    table = np.stack([part.values.flat.astype(np.float64) for part in parts])
    np.testing.assert_allclose(distances(metric(current, phase), [part.values for part in parts]), apart(table), rtol=1e-5)


def test_factors_that_do_not_pair_are_measured_as_they_are(draw):
    """Several B on one A."""
    shared = Layout.of([Entry("A", "q.A", (2, 6)), Entry("B", "q.B.0", (5, 2)), Entry("B", "q.B.1", (5, 2))])
    for phase in (Phase("all", frozenset({"A", "B"})), Phase("B", frozenset({"B"}))):
        current, parts = drawn(shared, phase, 5, draw)
        table = np.stack([part.values.flat.astype(np.float64) for part in parts])
        np.testing.assert_allclose(distances(metric(current, phase), [part.values for part in parts]), apart(table), rtol=1e-5)


def test_what_a_scheme_sends_beside_the_phase_is_blended_but_not_measured(layouts, draw):
    phase = Alternating().phase(1, layouts["lora"])
    current, parts = drawn(layouts["lora"], phase, 5, draw)
    more = Layout.of([*parts[0].values.layout.entries, Entry("probe", "q.probe", (3, 4))])
    rng = np.random.default_rng(2)
    wider = [Part(p.weight, draw(more, rng, 1e3).patch(p.values)) for p in parts]
    chosen = Krum(1).combine(current, wider, phase)
    assert chosen.pick(phase.roles).digest == Krum(1).combine(current, parts, phase).digest
    assert any(chosen.digest == part.values.digest for part in wider)
    median = Median().combine(current, wider, phase).pick({"probe"}).flat
    np.testing.assert_array_equal(median, np.median([part.values.pick({"probe"}).flat for part in wider], axis=0))


@pytest.mark.parametrize("kind", sorted(SCHEMES))
def test_every_phase_of_every_scheme_is_measured_or_refused_by_name(layouts, draw, kind):
    """Seven sites send noise in the layout that the scheme's sites send; every rule answers or says which scheme to take."""
    scheme, rng, seen = SCHEMES[kind](), np.random.default_rng(0), 0
    for layout in layouts.values():
        try:
            scheme.check(layout)
        except UpdateError:
            continue
        for round in (1, 2, 3, 4):
            phase, current = scheme.phase(round, layout), draw(layout, rng)
            parts = [Part(1.0, draw(scheme.travels(layout, phase), rng)) for _ in range(7)]
            for rule in (Median(), Krum(1), Bulyan(1), RFA(), NormBound()):
                try:
                    rule.check(layout, phase)
                except UpdateError as fault:
                    found = str(fault)
                else:
                    found = f"finite: {rule.combine(current, parts, phase).finite}"
                assert re.search("finite: True|multiply and move in one round|use scheme fedsb", found)
                seen += 1
    assert seen
