"""What the aggregation benchmarks share: layouts of many small arrays, flwr's replies, and the least CPU time of interleaved runs."""

from __future__ import annotations

from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np

from fedpeft.tensors import Entry, Layout, Tensors


def layout_of(arrays: int, size: int) -> Layout:
    """``arrays`` flat tensors of ``size`` values, one role."""
    return Layout.of([Entry("B", f"layers.{place:03}.lora_B.weight", (size,)) for place in range(arrays)])


def reply(delta: Tensors, weight: float) -> Any:
    """What a Flower client answers: one array per tensor and one metric."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

    arrays = ArrayRecord({name: Array(values) for name, values in delta.named().items()})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"weight": weight})})


def aggregate(replies: list[Any]) -> Any:
    """Flower's weighted mean, which all its averaging strategies call."""
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    return aggregate_arrayrecords(replies, "weight")


def flat_of(record: Any) -> Any:
    """The values of a Flower array record in one vector."""
    return np.concatenate([array.numpy().ravel() for array in record.values()])


def least(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least CPU seconds of each contender over ``repeats`` interleaved rounds."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(repeats):
        for name, work in contenders.items():
            began = process_time()
            work()
            best[name] = min(best[name], process_time() - began)
    return best


def row_of(row: str, case: str, seconds: dict[str, float], ours: str, goal: str = "") -> dict[str, object]:
    """One row of the table, from seconds by contender: ``ours``, ``peer`` and ``floor``."""
    return {
        "row": row,
        "case": case,
        "ours": seconds[ours],
        "peer": seconds["peer"],
        "ratio": seconds["peer"] / seconds[ours],
        "floor": seconds["floor"],
        "floor_share": seconds["floor"] / seconds[ours],
        "limit": seconds["peer"] / seconds["floor"],
        "goal": goal,
        "unit": "CPU s",
    }
