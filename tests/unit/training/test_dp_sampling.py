"""Which examples a private step draws, and in which batches it runs them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.unit.training.private import SGD, TASK, private, rows

from fedpeft.tasks import Choice, Classification, Encoded
from fedpeft.training.dp_sampling import batches_of, subset


def test_sampling_is_poisson(live):
    run = private(live, replace(SGD, batch_size=10))
    drawn, sizes = run.windows(rows(50)), []
    for _ in range(200):
        sizes.append(sum(batch.examples for batch in next(drawn)))
    assert run.rate == 0.2
    assert np.mean(sizes) == pytest.approx(10, abs=5 * np.sqrt(8 / 200))
    assert np.var(sizes) == pytest.approx(8, rel=0.5)


def test_batches_are_whole_and_of_a_size_that_runs(live):
    data = rows(30)
    for count in (0, 1, 7, 12, 30):
        parts = [batch.examples for batch in batches_of(TASK, data, np.arange(count), 8)]
        assert sum(parts) == count
        assert max(parts, default=0) <= 12
    long = replace(data, ids=tuple(np.full(900, 5, np.int32) for _ in range(30)))
    assert [batch.examples for batch in batches_of(TASK, long, np.arange(5), 8)] == [2, 2, 1]


def test_subsets_keep_what_belongs_together():
    zero, places = np.zeros(6, np.int64), np.array([0, 2])
    ids = tuple(np.full(3, number, np.int32) for number in range(6))
    choices = Encoded(ids, np.array([1, 2, 5]), zero, np.array([0, 0, 1, 1, 2, 2]), 0)
    part = subset(choices, places, True)
    assert [int(one[0]) for one in part.ids] == [0, 1, 4, 5]
    assert (part.labels.tolist(), part.owners.tolist()) == ([1, 3], [0, 0, 1, 1])
    (batch,) = batches_of(Choice("c"), choices, places, 2)
    assert set(batch.inputs["input_ids"][0].tolist()) == {1, 5}
    classes = Encoded(ids, np.array([1, 0, 1, 0, 1, 1]), zero, np.arange(6), 0)
    (batch,) = batches_of(Classification("k", ("a", "b")), classes, places, 2)
    assert sorted(zip(batch.inputs["input_ids"][:, 0].tolist(), batch.labels.tolist(), strict=True)) == [(0, 1), (2, 1)]
