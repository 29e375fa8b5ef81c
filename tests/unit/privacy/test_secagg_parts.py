"""The parts of masked sums: keys, ciphertexts, shares, graphs and streams, tampered with and whole."""

from __future__ import annotations

import dataclasses
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.privacy.vectors import QUICK, vectors_of

from fedpeft.errors import PrivacyError
from fedpeft.privacy.secagg import Box, Instance, Member, keystream, masks, neighbours, shamir, shape


def tampered_key(run):
    bundle = run.collector.bundles["site001"]
    run.collector.bundles["site001"] = dataclasses.replace(bundle, mask_key=bytes(32))


def invented_site(run):
    bundle = run.collector.bundles["site001"]
    forged = dataclasses.replace(bundle, signature=run.keys["site002"].sign(bundle.signed(run.instance)))
    run.collector.bundles["site001"] = forged


@pytest.mark.parametrize("attack", [tampered_key, invented_site])
def test_keys_that_a_site_did_not_sign_are_refused(attack, play):
    run = play(4)
    run.keyed()
    attack(run)
    with pytest.raises(PrivacyError, match="'site001' cannot be believed: its signature does not hold"):
        run.dealt()


def test_an_unknown_site_is_refused(play):
    run = play(4)
    run.keyed()
    with pytest.raises(PrivacyError, match="public key is not known"):
        run.members["site000"].deal(run.collector.bundles_for("site000"), {})


def test_a_bundle_of_another_instance_is_refused(play):
    run = play(4)
    run.keyed()
    other = Instance("run/2/0/task/train", run.instance.members)
    with pytest.raises(PrivacyError, match="does not hold"):
        Member(other, "site000").deal(run.collector.bundles_for("site000"), run.pins)


@pytest.mark.parametrize("place", [0, 13, 40])
def test_a_changed_ciphertext_is_found_before_anything_leaves(place, play):
    run = play(4)
    run.keyed()
    run.dealt()
    box = run.collector.boxes["site001"]["site000"]
    payload = bytearray(box.payload)
    payload[place] ^= 1
    run.collector.boxes["site001"]["site000"] = Box("site001", "site000", bytes(payload))
    with pytest.raises(PrivacyError, match="changed on the way"):
        run.masked(vectors_of(run))


@pytest.mark.parametrize("kind", ["seeds", "keys"])
def test_a_changed_share_is_found_and_nothing_is_released(kind, play):
    run = play(5, {"site004": "mask", "site003": "reveal"})
    vectors = vectors_of(run)
    run.keyed()
    run.dealt()
    run.masked(vectors)
    run.agreed()
    run.revealed()
    victim = "site003" if kind == "seeds" else "site004"
    reveal = run.collector.reveals["site000"]
    shares = {**getattr(reveal, kind)}
    shares[victim] = bytes([shares[victim][0] ^ 1, *shares[victim][1:]])
    run.collector.reveals["site000"] = dataclasses.replace(reveal, **{kind: shares})
    with pytest.raises(PrivacyError, match="tampered with"):
        run.collector.result()


def test_a_torn_state_is_named(play):
    run = play(3)
    with pytest.raises(PrivacyError, match="torn"):
        Member.from_bytes(run.members["site000"].to_bytes()[:-9])


@QUICK
@given(secret=st.binary(min_size=32, max_size=32), count=st.integers(2, 12), data=st.data())
def test_any_threshold_of_shares_opens_and_fewer_do_not(secret, count, data):
    secret = secret[:-1] + bytes([secret[-1] & 0x7F])
    threshold = data.draw(st.integers(2, count))
    shares = shamir.split(secret, threshold, count, b"entropy")
    chosen = data.draw(st.permutations(range(count)))
    picked = {place + 1: shares[place] for place in chosen[:threshold]}
    assert shamir.combine(picked, threshold) == secret
    few = dict(list(picked.items())[:-1])
    with pytest.raises(PrivacyError, match="are needed"):
        shamir.combine(few, threshold)
    with suppress(PrivacyError):
        assert shamir.combine(few | {count + 1: bytes(32)}, threshold) != secret


def test_shares_are_checked_against_one_another():
    shares = dict(enumerate(shamir.split(bytes(32), 3, 5, b"e"), 1))
    shares[5] = bytes([shares[5][0] ^ 1]) + shares[5][1:]
    with pytest.raises(PrivacyError, match="one polynomial"):
        shamir.combine(shares, 3)


@pytest.mark.parametrize("sites", [3, 4, 5, 10, 50, 100, 300])
def test_two_quorums_share_an_honest_member_and_drops_are_survived(sites):
    found = shape(sites)
    whole = sites if found.complete else found.degree + 1
    assert 2 * found.quorum > whole + (int(0.1 * sites) if found.complete else 0)
    assert found.quorum <= sites - int(0.2 * sites)
    graph = neighbours([str(site) for site in range(sites)], found.degree, b"seed")
    assert all(len(near) == found.degree and name not in near for name, near in graph.items())
    assert all(name in graph[other] for name, near in graph.items() for other in near)


def test_the_largest_cohorts_with_the_worst_shares_find_a_safe_graph_at_once():
    found = shape(32768, 0.3, 0.3)
    assert 2 * found.threshold > found.degree * 1.3
    assert shape(2000, 0.45, 0.25).quorum * 2 > 0.45 * shape(2000, 0.45, 0.25).degree


def test_shares_that_nobody_dealt_are_refused(play):
    run = play(4)
    run.keyed()
    run.dealt()
    run.masked(vectors_of(run))
    run.agreed()
    reveal = run.members["site000"].reveal(run.collector.signatures_for("site000"), run.pins)
    for stranger in ("site000", "zombie"):
        with pytest.raises(PrivacyError, match="nobody dealt"):
            run.collector.add_reveal(dataclasses.replace(reveal, seeds={**reveal.seeds, stranger: bytes(32)}))


def test_the_degree_grows_slowly():
    degrees = {sites: shape(sites).degree for sites in (200, 1000, 5000)}
    assert degrees[1000] < 2.5 * degrees[200]
    assert degrees[5000] < 2 * degrees[1000]


@pytest.mark.parametrize("sites", [80, 125, 250, 500, 1000, 2000, 8000, 32768])
def test_pairs_of_a_sparse_graph_are_at_most_a_constant_times_n_log_n(sites):
    assert shape(sites).degree <= 22 * np.log2(sites)


def test_each_site_is_told_of_its_neighbours_alone(play):
    """What is handed over follows from the graph: twice its pairs of bundles, boxes and signatures, not all pairs of sites."""
    run = play(90)
    degree = run.instance.shape.degree
    assert degree < 60
    run.keyed()
    run.dealt()
    run.masked(vectors_of(run, 8))
    run.agreed()
    for name in run.members:
        assert len(run.collector.bundles_for(name)) == degree + 1
        assert len(run.collector.boxes_for(name)) == degree
        assert len(run.collector.signatures_for(name)) == degree + 1


@QUICK
@given(count=st.integers(2, 30), data=st.data())
def test_lagrange_weights_are_those_of_the_formula(count, data):
    """Against the textbook product, at zero and at every point that is not among those given."""
    points = tuple(sorted(data.draw(st.sets(st.integers(1, 300), min_size=count, max_size=count))))
    x = data.draw(st.integers(0, 300).filter(lambda one: one not in points))
    slow = []
    for mine in points:
        weight = 1
        for other in points:
            if other != mine:
                weight = weight * (x - other) * pow(mine - other, -1, shamir.PRIME) % shamir.PRIME
        slow.append(weight)
    assert list(shamir._lagrange(points, x)) == slow


def test_masks_cancel_and_streams_do_not_repeat():
    one, two = keystream(b"k" * 16, 200_000), keystream(b"l" * 16, 200_000)
    assert not np.array_equal(one, two)
    assert len(np.unique(one[:1000])) > 990
    assert np.array_equal(one[:65536], keystream(b"k" * 16, 65536))
    assert not np.array_equal(one[:65536], one[65536 : 2 * 65536])


@pytest.mark.parametrize("size", [1, 65535, 65536, 65537, 200_001])
def test_both_ways_to_a_stream_give_the_same_bytes(size, monkeypatch):
    """A coordinator and its sites may be machines on which another one is faster."""
    found = []
    for way in (masks._ctr, masks._gcm):
        monkeypatch.setattr(masks, "_fastest", lambda way=way: way)
        found.append(keystream(b"k" * 16, size))
    assert np.array_equal(*found)
    slow = masks.Cipher(masks.algorithms.AES(b"k" * 16), masks.modes.CTR(bytes(15) + b"\2")).encryptor().update(bytes(4 * size))
    assert np.array_equal(found[0], np.frombuffer(slow, "<i4"))
