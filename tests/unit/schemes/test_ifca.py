"""Which cluster a site takes: least loss, spread at ties."""

from __future__ import annotations

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.schemes import ifca

LOSSES = st.dictionaries(st.sampled_from(ifca.names("chat", 6)), st.floats(0.1, 9.0), min_size=1)


@given(losses=LOSSES, site=st.text(max_size=5))
def test_the_least_loss_wins_whoever_asks(losses: dict[str, float], site: str) -> None:
    assert losses[ifca.choose(losses, site)] <= min(losses.values()) * (1 + ifca.TIE)


@given(losses=LOSSES, site=st.text(max_size=5))
def test_clusters_without_a_finite_loss_are_never_taken(losses: dict[str, float], site: str) -> None:
    broken = {"chat.8": nan, "chat.9": inf}
    assert ifca.choose(losses | broken, site) == ifca.choose(losses, site)
    with pytest.raises(UpdateError, match="no loss is finite"):
        ifca.choose(broken, site)


def test_equal_clusters_are_spread_over_the_sites_and_each_site_stays() -> None:
    equal = dict.fromkeys(ifca.names("chat", 3), 2.0)
    taken = [ifca.choose(equal, f"site-{number}") for number in range(60)]
    assert taken == [ifca.choose(equal, f"site-{number}") for number in range(60)]
    assert min(taken.count(name) for name in equal) >= 10


def test_names() -> None:
    assert ifca.names("chat", 2) == ("chat.0", "chat.1")
    assert ifca.is_cluster("chat.1", "chat")
    assert not any(ifca.is_cluster(name, "chat") for name in ("chat", "chat.x", "chat.", "chats.1", "chat.1.2"))
