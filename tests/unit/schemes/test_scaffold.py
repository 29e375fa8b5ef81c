"""SCAFFOLD against its paper's algorithm under SGD, in float64."""

import numpy as np
import pytest

from fedpeft.errors import UpdateError
from fedpeft.schemes import SGD, Adam, Controls, Scaffold, SiteContext, pack_state, unpack_state
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Grid, Update

LAYOUT = Layout.of([Entry("bias", "b", (4,)), Entry("head", "h", (2,))])
RATE, STEPS, SITES = 0.1, 5, 4


def losses(rng):
    """A quadratic per site: gradient H (x - c)."""
    out = []
    for _ in range(SITES):
        root = rng.standard_normal((6, 6))
        out.append((root @ root.T / 6 + np.eye(6), rng.standard_normal(6) * 2))
    return out


def oracle(problems, rounds, option, chosen):
    """Algorithm 1 with K steps of SGD, global rate 1, equal weights, ``chosen[t]`` the sites of round t."""
    x, c, own = np.zeros(6), np.zeros(6), [np.zeros(6) for _ in problems]
    for t in range(rounds):
        moves, changes = [], []
        for i in chosen[t]:
            h, center = problems[i]
            y, raw = x.copy(), []
            for _ in range(STEPS):
                raw.append(h @ (y - center))
                y = y - RATE * (raw[-1] - own[i] + c)
            new = own[i] - c + (x - y) / (STEPS * RATE) if option == 2 else np.mean(raw, axis=0)
            moves.append(y - x)
            changes.append(new - own[i])
            own[i] = new
        x = x + np.mean(moves, axis=0)
        c = c + len(chosen[t]) / len(problems) * np.mean(changes, axis=0)
    return x, c


def ours(problems, rounds, chosen, scheme):
    """The same through the scheme and the integer ring; sites compute in float64 on what float32 the plan gives."""
    x, state, own = Tensors.zeros(LAYOUT), {}, [Tensors.zeros(LAYOUT) for _ in problems]
    grid = Grid(SITES, 8.0)
    for t in range(rounds):
        phase = scheme.phase(t + 1, LAYOUT)
        c = scheme.control(LAYOUT, phase, state)
        total = Update.zero(scheme.travels(LAYOUT, phase), grid)
        for i in chosen[t]:
            h, center = problems[i]
            y, raw = x.flat.astype(np.float64), []
            for _ in range(STEPS):
                raw.append(h @ (y - center))
                y = y - RATE * (raw[-1] - own[i].flat + c.flat)
            gradient = Tensors(LAYOUT, np.mean(raw, axis=0).astype(np.float32))
            site = SiteContext(0, str(i), control=(c, own[i]), gradient=gradient)
            total += Update.encode(scheme.contribution(x, Tensors(LAYOUT, y.astype(np.float32)), phase, site), 1.0, {}, grid)
            own[i] = gradient
        x, state = scheme.advance(x, total.mean(), phase, SGD(), unpack_state(pack_state(state)))
    return x.flat, scheme.control(LAYOUT, scheme.phase(1, LAYOUT), state).flat


def optimum(problems):
    return np.linalg.solve(sum(h for h, _ in problems), sum(h @ center for h, center in problems))


@pytest.mark.parametrize("share", [SITES, 2])
def test_it_is_the_papers_algorithm_and_the_mean_gradient_is_option_two(share):
    rng = np.random.default_rng(0)
    problems, rounds = losses(rng), 12
    chosen = [rng.choice(SITES, share, replace=False) for _ in range(rounds)]
    one, two = oracle(problems, rounds, 1, chosen), oracle(problems, rounds, 2, chosen)
    for left, right in zip(one, two, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-9)
    for got, wanted in zip(ours(problems, rounds, chosen, Scaffold(share / SITES)), two, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_it_reaches_the_optimum_where_plain_averaging_is_biased():
    rng = np.random.default_rng(1)
    problems, everyone = losses(rng), [range(SITES)] * 150
    x, c = ours(problems, 150, everyone, Scaffold())
    best = optimum(problems)
    assert np.linalg.norm(x - best) < 1e-4
    assert np.linalg.norm(c) < 1e-3
    plain = np.zeros(6)
    for _ in range(150):
        ends = []
        for h, center in problems:
            y = plain.copy()
            for _ in range(STEPS):
                y = y - RATE * (h @ (y - center))
            ends.append(y)
        plain = np.mean(ends, axis=0)
    assert np.linalg.norm(plain - best) > 0.05


def test_corrections_belong_to_a_role_and_wait_while_it_stands_still(layouts, draw):
    rng, layout, scheme = np.random.default_rng(0), layouts["lora"], Scaffold(factors="alternating")
    current, state, seen = draw(layout, rng), {}, {}
    for round in range(1, 5):
        phase = scheme.phase(round, layout)
        part = layout.subset(phase.roles)
        change = draw(part, rng, 0.1)
        c = scheme.control(layout, phase, state)
        for role in phase.roles:
            np.testing.assert_array_equal(c.pick({role}).flat, seen.get(role, np.zeros(part.subset({role}).size, np.float32)))
        site = SiteContext(0, control=(c, c), gradient=c + change)
        current, state = scheme.advance(current, scheme.contribution(current, current, phase, site), phase, Adam(), state)
        for role in phase.roles:
            seen[role] = scheme.control(layout, phase, state).pick({role}).flat
            np.testing.assert_allclose(seen[role], c.pick({role}).flat + change.pick({role}).flat, atol=1e-6)
    assert {"control.A", "control.B", "B.m", "A.v"} <= set(state)


def test_what_is_missing_or_foreign_is_named(layouts, draw):
    layout, scheme = layouts["lora"], Scaffold()
    current, phase = draw(layout, np.random.default_rng(0)), scheme.phase(1, layout)
    assert isinstance(scheme, Controls)
    assert scheme.travels(layout, phase).size == 2 * layout.size
    assert not scheme.control(layout, phase, {}).flat.any()
    with pytest.raises(UpdateError, match="no corrections"):
        scheme.contribution(current, current, phase, SiteContext(0))
    with pytest.raises(UpdateError, match="belong to another adapter"):
        scheme.control(layout, phase, {"control.B": np.zeros(3, np.float32)})
