"""B5, B6: median, trimmed mean and Krum over 50 sites' 0.4 M values, ours and flwr's own strategies, in CPU time.

Peer: ``FedMedian``, ``FedTrimmedAvg`` and ``Krum`` over replies of 224 float32 arrays, and the distances that its Krum takes. Ours: the
same float32 values as `Part`s; "from codes" decodes each site's int32 codes first, as a coordinator does. One thread, interleaved in
one process, least CPU time; results are compared before. The floor is one read of all values, for
the distances one product of the stacked values with their transpose.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tests.bench._common import flat_of, layout_of, least, reply, row_of

from fedpeft.schemes import Part, Phase
from fedpeft.schemes.robust import CombineRule, Krum, Median, MultiKrum, Trimmed
from fedpeft.schemes.robust.geometry import distances, metric
from fedpeft.tensors import Tensors
from fedpeft.update import Grid, Update

ARRAYS, SIZE, SITES, LIARS, SHARE = 224, 1_786, 50, 10, 0.2
LAYOUT = layout_of(ARRAYS, SIZE)
CURRENT, PHASE, GRID = Tensors.zeros(LAYOUT), Phase("all", LAYOUT.roles), Grid(SITES)


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Rows of CPU seconds."""
    _quiet()
    rng = np.random.default_rng(0)
    parts = [Part(1.0, Tensors(LAYOUT, rng.standard_normal(LAYOUT.size, np.float32) * np.float32(1e-3))) for _ in range(SITES)]
    return [
        *_rule("B5", "robust_median", Median(), _strategy("FedMedian"), parts, repeats, 6.0),
        *_rule("B6", "robust_trimmed", Trimmed(SHARE), _strategy("FedTrimmedAvg", beta=SHARE), parts, repeats, 6.0),
        *_distances(parts, repeats),
        *_rule("B6", "robust_krum", Krum(LIARS), _strategy("Krum", num_malicious_nodes=LIARS), parts, repeats, None),
        *_rule(
            "B6",
            "robust_multikrum",
            MultiKrum(LIARS, 20),
            _strategy("MultiKrum", num_malicious_nodes=LIARS, num_nodes_to_select=20),
            parts,
            repeats,
            None,
        ),
    ]


def _rule(
    row: str, name: str, rule: CombineRule, peer: Any, parts: list[Part], repeats: int, goal: float | None
) -> list[dict[str, object]]:
    codes = [Update.encode(part.values, 1.0, {}, GRID) for part in parts]
    messages = _messages(parts, repeats + 1)
    contenders: dict[str, Callable[[], Any]] = {
        "peer": lambda: peer.aggregate_train(1, next(messages))[0],
        "from values": lambda: rule.combine(CURRENT, parts, PHASE),
        "from codes": lambda: rule.combine(CURRENT, [Part(1.0, code.mean()) for code in codes], PHASE),
        "floor": lambda: [part.values.flat.max() for part in parts],
    }
    np.testing.assert_allclose(contenders["from values"]().flat, flat_of(contenders["peer"]()), rtol=0, atol=1e-8)
    seconds = least(contenders, repeats)
    case = f"{name} {SITES} x {LAYOUT.size / 1e6:.1f}M"
    return [row_of(row, f"{case}, {ours}", seconds, ours, f"ratio >= {goal:.0f}" if goal else "") for ours in ("from values", "from codes")]


def _distances(parts: list[Part], repeats: int) -> list[dict[str, object]]:
    from flwr.serverapp.strategy.multikrum import compute_distances

    records = [reply(part.values, 1.0)["arrays"] for part in parts]
    values = [part.values for part in parts]
    stacked = np.stack([value.flat for value in values])
    contenders: dict[str, Callable[[], Any]] = {
        "peer": lambda: compute_distances(records),
        "ours": lambda: distances(metric(CURRENT, PHASE), values),
        "floor": lambda: stacked @ stacked.T,
    }
    ours, peer = contenders["ours"](), contenders["peer"]()
    np.testing.assert_allclose(ours, peer, rtol=1e-4, atol=1e-4 * float(peer.max()))
    return [row_of("B6", f"krum_distances {SITES} x {LAYOUT.size / 1e6:.1f}M", least(contenders, repeats), "ours", "ratio >= 15")]


def _strategy(name: str, **settings: Any) -> Any:
    import flwr.serverapp.strategy as strategies

    return getattr(strategies, name)(weighted_by_key="weight", **settings)


def _messages(parts: Sequence[Part], count: int) -> Iterator[list[Any]]:
    """``count`` lists of replies over the same arrays: some strategies take the arrays out of the replies."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    records = [reply(part.values, 1.0)["arrays"] for part in parts]
    lists = []
    for _ in range(count):
        contents = [RecordDict({"arrays": ArrayRecord(dict(record)), "metrics": MetricRecord({"weight": 1.0})}) for record in records]
        lists.append([Message(content, 1, "train") for content in contents])
    return iter(lists)


def _quiet() -> None:
    """Flower logs every aggregation."""
    import flwr.serverapp.strategy  # noqa: F401 - makes the logger

    logging.getLogger("flwr").setLevel(logging.ERROR)


if __name__ == "__main__":
    for found in run():
        print(found)
