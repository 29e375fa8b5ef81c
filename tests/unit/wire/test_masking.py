"""Masked sums on the wire: what comes back is what was sent; whatever else comes is refused by name and in no time."""

from __future__ import annotations

from contextlib import suppress

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import PrivacyError
from fedpeft.privacy.secagg import Box, Bundle, Instance, Reveal
from fedpeft.wire import masking
from fedpeft.wire.v1 import federation_pb2 as pb

KEY = st.binary(min_size=32, max_size=32)
NAMES = st.text(st.characters(codec="utf-8"), max_size=20)


@given(name=NAMES, keys=st.tuples(KEY, KEY, KEY), signature=st.binary(max_size=512), payload=st.binary(max_size=256))
def test_messages_come_back(name, keys, signature, payload):
    bundle, box = Bundle(name, *keys, signature), Box(name, "other", payload)
    reveal = Reveal(name, keys[0], {"a": keys[1]}, {"b": keys[2]})
    instance = Instance("n", ("a", "b", "c", "d"), 0.2, 0.1, 4)
    assert masking.bundle_of(masking.bundle_message(bundle)) == bundle
    assert masking.boxes_of([masking.box_message(box)]) == [box]
    assert masking.reveal_of(name, masking.reveal_message(reveal)) == reveal
    assert masking.instance_of(masking.instance_message(instance)) == instance


@settings(max_examples=300, deadline=2000)
@given(body=st.binary(max_size=200))
def test_garbage_is_refused_or_read_never_crashed_on(body):
    readers = {
        pb.Instance: masking.instance_of,
        pb.Bundle: masking.bundle_of,
        pb.Box: lambda box: masking.boxes_of([box]),
        pb.Reveal: lambda reveal: masking.reveal_of("x", reveal),
        pb.Masked: lambda masked: masking.counters_of(masked.counters),
    }
    for kind, read in readers.items():
        with suppress(DecodeError, PrivacyError):
            read(kind.FromString(body))


@pytest.mark.parametrize(
    "changes",
    [
        {"members": ["a", "b"]},
        {"members": ["a", "a", "b"]},
        {"members": ["a", "b", "c" * 600]},
        {"members": [str(number) for number in range(40_000)]},
        {"members": [str(number) for number in range(30_000)], "colluding": 0.45, "dropping": 0.27},
        {"colluding": float("nan")},
        {"dropping": -0.1},
        {"colluding": 0.6, "dropping": 0.3},
        {"least": 2},
        {"least": 1 << 31},
    ],
    ids=["few", "twins", "name", "crowd", "dense", "nan", "negative", "no quorum", "least", "most"],
)
def test_instances_that_cannot_be(changes):
    fields = {"name": "n", "members": ["a", "b", "c"], "colluding": 0.1, "dropping": 0.2, "least": 3}
    with pytest.raises(PrivacyError):
        masking.instance_of(pb.Instance(**{**fields, **changes}))


def test_sizes_in_bounds():
    good = {"site": "a", "mask_key": bytes(32), "box_key": bytes(32), "seed_check": bytes(32)}
    for changes in ({"mask_key": b"x"}, {"seed_check": bytes(33)}, {"signature": bytes(513)}):
        with pytest.raises(PrivacyError):
            masking.bundle_of(pb.Bundle(**{**good, **changes}))
    with pytest.raises(PrivacyError, match="two bundles"):
        masking.bundles_of([pb.Bundle(**good)] * 2)
    with pytest.raises(PrivacyError, match="larger"):
        masking.boxes_of([pb.Box(payload=bytes(257))])
    with pytest.raises(PrivacyError, match="512"):
        masking.signature_of(bytes(513))
    for lengths in ({str(number): 1 for number in range(masking.MAX_COUNTERS + 1)}, {"a": masking.MAX_VALUES, "b": 1}):
        with pytest.raises(PrivacyError, match="counters"):
            masking.counters_of(lengths)


def test_what_all_sites_are_told_decides_the_purpose_and_nothing_of_their_own_does():
    plan = pb.TaskPlan(task="t", seed=3, adapter_digest="ab", roles=["A"])
    mine = pb.TaskPlan(task="t", seed=3, adapter_digest="ab", roles=["A"], previous_digest="x", down_roles=["B"], counted_round=4, cohort=9)
    assert masking.purpose("r", 1, "train", plan) == masking.purpose("r", 1, "train", mine)
    for field, value in (("seed", 4), ("adapter_digest", "cd"), ("settings_json", "{}"), ("weight_cap", 2), ("privacy_json", "{}")):
        other = pb.TaskPlan()
        other.CopyFrom(plan)
        setattr(other, field, value)
        assert masking.purpose("r", 1, "train", other) != masking.purpose("r", 1, "train", plan)
    assert masking.work_of(masking.purpose("r", 1, "train", plan) + "#1", "r", 1, "t") == "r/1/t/train"
