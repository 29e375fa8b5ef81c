"""FedSA, its mirror and FedDPA: what is shared moves by the mean, what is private neither travels nor moves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.schemes import SGD, FedDPA, FedSA, SiteContext, check_start
from fedpeft.tensors import Entry, Layout, Tensors

SCHEMES = [FedSA(share, head) for share in "AB" for head in ("shared", "private")] + [FedDPA(f) for f in ("alternating", "both", "ffa")]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), round=st.integers(1, 4), count=st.integers(1, 4))
def test_only_what_is_shared_travels_and_moves(scheme, layouts, draw, averaged, seed, round, count):
    rng, layout = np.random.default_rng(seed), layouts["double"]
    before, phase = draw(layout, rng), scheme.phase(round, layout)
    sites = [before.patch((before + draw(layout, rng, 0.3)).pick(phase.trains)) for _ in range(count)]
    shares = rng.dirichlet(np.ones(count))
    moves = [scheme.contribution(before, site, phase, SiteContext(0)) for site in sites]
    assert all(move.layout == layout.subset(phase.roles) == scheme.travels(layout, phase) for move in moves)
    after, _ = scheme.advance(before, averaged(moves, shares), phase, SGD(), {})
    for role in layout.roles:
        mean = sum(p * s.pick({role}).flat.astype(np.float64) for p, s in zip(shares, sites, strict=True))
        if role in phase.roles:
            np.testing.assert_allclose(after.pick({role}).flat, mean, atol=2e-6)
        else:
            assert after.pick({role}).digest == before.pick({role}).digest
    assert not phase.private & scheme.roles(layout)
    assert scheme.exact(layout) == (scheme.kind == "feddpa" and scheme.factors != "both")


def test_which_roles_stay(layouts):
    lora, double = layouts["lora"], layouts["double"]
    assert FedSA().phase(1, lora).private == {"B", "head"}
    assert FedSA("A", "shared").phase(2, lora).private == {"B"}
    assert FedSA("B", "shared").phase(2, lora).private == {"A"}
    for round in (1, 2):
        assert FedDPA().phase(round, double).private == {"A2", "B2"}
    assert FedDPA().phase(1, double).roles == double.roles - {"A", "A2", "B2"}
    assert FedDPA().phase(2, double).roles == double.roles - {"B", "A2", "B2"}
    with pytest.raises(UpdateError, match=r"method\.extra"):
        FedDPA().check(lora)
    with pytest.raises(UpdateError, match=r"method\.kind"):
        FedSA().check(layouts["ia3"])
    FedSA().check(Layout.of([Entry("A", "q.lambda_d", (4,)), Entry("B", "q.lambda_b", (6,))]))


def test_a_zero_b_may_train_where_both_factors_do(layouts, draw):
    fresh = draw(layouts["lora"], np.random.default_rng(0)).patch(Tensors.zeros(layouts["lora"].subset({"B"})))
    check_start(fresh, FedSA().phase(1, fresh.layout))
    with pytest.raises(UpdateError, match="round of B"):
        check_start(fresh, FedDPA().phase(2, fresh.layout))


def test_sites_with_different_private_factors_share_one_mean(layouts, draw, averaged):
    """Every site trains from its own B; what travels does not depend on it."""
    rng, layout, scheme = np.random.default_rng(3), layouts["lora"], FedSA()
    common, phase = draw(layout, rng), scheme.phase(1, layout)
    step = draw(layout.subset({"A"}), rng, 0.1)
    mine = [common.patch(draw(layout.subset({"B"}), rng)) for _ in range(3)]
    moves = [scheme.contribution(own, own.patch(own.pick({"A"}) + step), phase, SiteContext(0)) for own in mine]
    assert len({move.digest for move in moves}) == 1
