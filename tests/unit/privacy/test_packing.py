"""A packed sum is the sum of updates, bit for bit, through masks and drop-outs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import PrivacyError
from fedpeft.privacy.packing import Schema, pack, unpack
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import COUNTER_LIMIT, Grid, Update

LAYOUT = Layout.of([Entry("B", "q.lora_B.weight", (5, 3)), Entry("head", "head.weight", (4,))])
COUNTS = {"train.loss": 2, "train.examples": 1}
LARGE = COUNTER_LIMIT / 8  # float64 sums of twelve are exact up to here, so they can be the oracle
VALUES = st.floats(-LARGE, LARGE) | st.floats(-1, 1)
SITES = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.floats(1e-6, 1.0), VALUES, VALUES, VALUES), min_size=1, max_size=12)


def updates(sites, grid):
    found = []
    for seed, weight, *counters in sites:
        delta = Tensors(LAYOUT, np.random.default_rng(seed).uniform(-1.9, 1.9, LAYOUT.size).astype(np.float32))
        found.append(Update.encode(delta, weight, {"train.loss": tuple(counters[:2]), "train.examples": (counters[2],)}, grid))
    return found


@settings(max_examples=60)
@given(sites=SITES)
def test_the_sum_of_packed_vectors_is_the_packed_sum(sites):
    schema = Schema(LAYOUT, Grid(len(sites)), COUNTS)
    parts = updates(sites, schema.grid)
    ring = np.zeros(schema.size, np.uint32)
    whole = parts[0]
    for part in parts:
        ring += pack(part, schema).view(np.uint32)
    for part in parts[1:]:
        whole += part
    found = unpack(ring.view(np.int32), schema, len(parts))
    assert np.array_equal(found.codes, whole.codes)
    assert (found.weight, found.count) == (whole.weight, whole.count)
    assert dict(found.counters) == dict(whole.counters)


def test_through_the_protocol(play):
    run = play(6, {"site001": "mask", "site004": "reveal"})
    schema = Schema(LAYOUT, Grid(6), COUNTS)
    parts = dict(zip(run.members, updates([(seed, 0.5, float(seed), -1.5, 3.25) for seed in range(6)], schema.grid), strict=True))
    found = unpack(run.run({name: pack(part, schema) for name, part in parts.items()}), schema, len(run.collector.survivors))
    names = [name for name in parts if name != "site001"]
    whole = parts[names[0]]
    for name in names[1:]:
        whole += parts[name]
    assert np.array_equal(found.codes, whole.codes)
    assert dict(found.counters) == dict(whole.counters)
    assert found.mean().digest == whole.mean().digest


def test_what_does_not_fit_is_refused():
    schema = Schema(LAYOUT, Grid(3), COUNTS)
    (part,) = updates([(0, 1.0, 1.0, 2.0, 3.0)], schema.grid)
    with pytest.raises(PrivacyError, match="counters"):
        pack(part, Schema(LAYOUT, schema.grid, {"train.loss": 2}))
    with pytest.raises(PrivacyError, match="needs int32"):
        unpack(pack(part, schema)[1:], schema, 1)
    wrong = pack(part, schema)
    wrong[0] = np.iinfo(np.int32).max
    with pytest.raises(PrivacyError, match="cannot send"):
        unpack(wrong, schema, 1)
    with pytest.raises(PrivacyError, match="sites"):
        Schema(LAYOUT, Grid(1 << 16), COUNTS)
