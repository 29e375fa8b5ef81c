"""The sum under masks is the plain sum, whoever vanishes when; whatever is tampered with is named and nothing is released."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.privacy.vectors import QUICK, STEPS, plain, vectors_of

from fedpeft.errors import PrivacyError
from fedpeft.privacy.secagg import Collector, Instance, Member, shape


@QUICK
@given(
    count=st.integers(3, 24),
    drops=st.lists(st.tuples(st.integers(0, 23), st.sampled_from(STEPS)), max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_sum_under_masks_is_the_plain_sum_or_nothing(play, count, drops, seed):
    names = [f"site{number:03d}" for number in range(count)]
    lost = {names[place]: step for place, step in drops if place < count}
    run = play(count, lost)
    vectors = vectors_of(run, seed=seed)
    tolerated = count - run.instance.shape.quorum
    if len(lost) <= min(tolerated, count - run.instance.shape.threshold - 1, count - 3):
        assert np.array_equal(run.run(vectors), plain(vectors, run.collector.survivors))
        assert set(run.collector.survivors) == {name for name in names if lost.get(name) not in ("bundle", "deal", "mask")}
    else:
        try:
            total = run.run(vectors)
        except PrivacyError:
            return
        assert np.array_equal(total, plain(vectors, run.collector.survivors))


@pytest.mark.parametrize(("count", "colluding", "dropping"), [(31, 0.2, 0.2), (110, 0.1, 0.1)])
def test_large_cohorts_with_a_tenth_vanished_at_every_step(play, count, colluding, dropping):
    vanish(play, count, colluding, dropping, 7)


@pytest.mark.slow
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(25, 140), colluding=st.sampled_from([0.0, 0.1, 0.2]), dropping=st.sampled_from([0.1, 0.2]), seed=st.integers(0, 99)
)
def test_any_large_cohort_with_a_tenth_vanished_at_every_step(play, count, colluding, dropping, seed):
    vanish(play, count, colluding, dropping, seed)


def vanish(play, count, colluding, dropping, seed):
    rng = np.random.default_rng(seed)
    gone = rng.permutation(count)[: count // 12]
    lost = {f"site{number:03d}": STEPS[place % 5] for place, number in enumerate(gone)}
    run = play(count, lost, colluding=colluding, dropping=dropping)
    vectors = vectors_of(run, 64, seed)
    assert np.array_equal(run.run(vectors), plain(vectors, run.collector.survivors))
    assert len(run.collector.survivors) == count - sum(step in ("bundle", "deal", "mask") for step in lost.values())


def test_a_sparse_graph_is_among_them():
    assert not shape(130).complete


def test_one_vector_looks_uniform_to_the_coordinator(play):
    """Byte counts of a masked constant vector: chi-square over 256 bins within five deviations of its mean."""
    run = play(5)
    run.keyed()
    run.dealt()
    member = run.members["site000"]
    masked = member.mask(np.full(1 << 18, 7, np.int32), run.collector.boxes_for("site000"), run.collector.dealers)
    counts = np.bincount(masked.view(np.uint8), minlength=256)
    expected = masked.nbytes / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert abs(statistic - 255) < 5 * np.sqrt(2 * 255)
    bits = np.unpackbits(masked.view(np.uint8)).reshape(-1, 32).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(1 << 18)


def test_fewer_than_three_are_refused_and_too_many_drops_open_nothing(play):
    with pytest.raises(PrivacyError, match="below 3"):
        _ = Instance("r", ("a", "b")).shape
    run = play(6, {f"site00{number}": "mask" for number in range(3)})
    with pytest.raises(PrivacyError, match="nothing is opened"):
        run.run(vectors_of(run))


def test_every_machine_goes_on_after_a_restart_at_every_step(play):
    run = play(4, {"site003": "mask"})
    vectors = vectors_of(run)
    for step in (run.keyed, run.dealt, lambda: run.masked(vectors), run.agreed, run.revealed):
        step()
        run.members = {name: Member.from_bytes(member.to_bytes()) for name, member in run.members.items()}
    assert np.array_equal(run.collector.result(), plain(vectors, run.collector.survivors))


def test_dealing_again_deals_shares_of_one_polynomial(play):
    run = play(4)
    run.keyed()
    first, second = (run.members["site000"].deal(run.collector.bundles_for("site000"), run.pins) for _ in range(2))
    opened = []
    for boxes in (first, second):
        twin = Member.from_bytes(run.members["site001"].to_bytes())
        twin.deal(run.collector.bundles_for("site001"), run.pins)
        twin.boxes = {box.sender: box.payload for box in boxes if box.recipient == "site001"}
        opened.append(twin._open("site000"))
    assert opened[0] == opened[1]


def test_one_mask_hides_one_vector_only(play):
    run = play(3)
    run.keyed()
    run.dealt()
    member, boxes = run.members["site000"], run.collector.boxes_for("site000")
    one = np.arange(10, dtype=np.int32)
    assert np.array_equal(member.mask(one, boxes, run.collector.dealers), member.mask(one, boxes, run.collector.dealers))
    with pytest.raises(PrivacyError, match="another vector"):
        member.mask(one + 1, boxes, run.collector.dealers)


def test_a_site_signs_one_set_of_survivors_for_ever(play):
    run = play(4, {"site003": "mask"})
    run.keyed()
    run.dealt()
    run.masked(vectors_of(run))
    member, keys = run.members["site000"], run.keys["site000"]
    member.agree(("site000", "site001", "site002"), keys)
    member.agree(("site002", "site001", "site000"), keys)
    with pytest.raises(PrivacyError, match="another set"):
        member.agree(("site000", "site001", "site002", "site003"), keys)
    with pytest.raises(PrivacyError, match="not among them"):
        run.members["site001"].agree(("site000", "site002", "site003"), run.keys["site001"])


def test_nothing_is_opened_where_one_site_put_its_values_elsewhere(play):
    """Told another schema, a site would put its values where those of the others are zeros: they would stand alone in the sum."""
    run = play(4)
    run.keyed()
    run.dealt()
    for name, vector in vectors_of(run).items():
        boxes, schema = run.collector.boxes_for(name), "its own" if name == "site000" else "that of all"
        run.collector.add_vector(name, run.members[name].mask(vector, boxes, run.collector.dealers, schema))
    with pytest.raises(PrivacyError, match="another vector was masked"):
        run.members["site001"].mask(vectors_of(run)["site001"], run.collector.boxes_for("site001"), run.collector.dealers, "its own")
    run.agreed()
    for member in run.members.values():
        with pytest.raises(PrivacyError, match="does not hold"):
            member.reveal(run.collector.signatures_for(member.site), run.pins)


def test_a_site_that_was_told_another_schema_stays_hidden_when_all_others_open_the_sum(play):
    """The others need no word of it to be a quorum; but its masks are of another schema and cancel with nobody's."""
    run = play(4)
    run.keyed()
    run.dealt()
    vectors = vectors_of(run, 4096)
    for name, vector in vectors.items():
        schema = "its own" if name == "site003" else "that of all"
        run.collector.add_vector(name, run.members[name].mask(vector, run.collector.boxes_for(name), run.collector.dealers, schema))
    others = [name for name in run.members if name != "site003"]
    for name in others:
        run.collector.add_agreement(name, run.members[name].agree(run.collector.survivors, run.keys[name]))
    for name in others:
        run.collector.add_reveal(run.members[name].reveal(run.collector.signatures_for(name), run.pins))
    left = run.collector.result("that of all").view(np.uint32) - plain(vectors, others).view(np.uint32)
    assert np.mean(left == vectors["site003"].view(np.uint32)) < 0.01
    assert np.abs(np.mean(left / 2.0**32) - 0.5) < 5 * np.sqrt(1 / 12 / left.size)


def test_a_quorum_of_words_is_checked_and_no_more(play):
    run = play(6)
    run.keyed()
    run.dealt()
    run.masked(vectors_of(run))
    run.agreed()
    words = {**run.collector.signatures_for("site000"), "site005": b"none"}
    quorum = run.instance.shape.quorum
    assert quorum < 6
    assert run.members["site000"].reveal(words, run.pins).seed == run.members["site000"].seed
    with pytest.raises(PrivacyError, match="'site001' cannot be believed"):
        run.members["site000"].reveal({**words, "site001": b"none"}, run.pins)
    few = dict(list(words.items())[: quorum - 1])
    with pytest.raises(PrivacyError, match=f"{quorum - 1} signatures on the survivors, {quorum} are needed"):
        run.members["site000"].reveal(few, run.pins)


def test_nobody_opens_both_secrets_of_one_site(play):
    """The coordinator tells half of the sites that site000 survived and the other half that it did not: neither half reveals."""
    run = play(6)
    run.keyed()
    run.dealt()
    run.masked(vectors_of(run))
    everyone = tuple(run.members)
    views = {name: everyone if number % 2 else everyone[1:] for number, name in enumerate(everyone[1:])}
    marks = {name: run.members[name].agree(view, run.keys[name]) for name, view in views.items()}
    for name in views:
        mine = {other: mark for other, mark in marks.items() if views[other] == views[name]}
        with pytest.raises(PrivacyError, match="signatures on the survivors"):
            run.members[name].reveal(mine, run.pins)
        with pytest.raises(PrivacyError, match="does not hold"):
            run.members[name].reveal(marks, run.pins)


def test_a_sum_is_opened_after_the_collector_was_kept_and_read_back(play):
    run = play(5, {"site004": "mask"})
    vectors = vectors_of(run)
    run.keyed()
    run.dealt()
    run.masked(vectors)
    kept = run.collector.to_bytes()
    run.collector = Collector.from_bytes(kept, run.collector.total)
    run.agreed()
    run.revealed()
    assert np.array_equal(run.collector.result(), plain(vectors, run.collector.survivors))
    for torn in (kept[:-3], b"[]", b'{"instance": 3}'):
        with pytest.raises(PrivacyError, match="torn"):
            Collector.from_bytes(torn, run.collector.total)
