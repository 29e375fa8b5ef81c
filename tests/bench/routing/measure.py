"""Nats of every test row under every way to answer it. Shape legend: N rows, E adapters, K labelled tokens, S tokens of a packed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tests.bench.routing.world import FEW, World

from fedpeft.adapters import Adapter, attach
from fedpeft.mixtures import Bank, Gates
from fedpeft.mixtures.routers import routed
from fedpeft.routing import FewShot, TokenRouter
from fedpeft.tasks import Batch, Generation, Row
from fedpeft.tasks.likelihood import PACK, owners, packed, token_losses

Losses = NDArray[np.float64]
"""(N, 2): nats and tokens of every row."""
Weights = Callable[[str, int], Sequence[float]]
"""Weights (E,) of a task's row."""


def batches(world: World, rows: Sequence[Row]) -> Iterator[tuple[list[int], Batch]]:
    """Rows in packs of at most `PACK` tokens, which are one forward each."""
    data, places = Generation("any", ("perplexity",)).encode(rows, world.base), list[int]()
    for place in range(len(rows)):
        if places and sum(len(data.ids[one]) for one in [*places, place]) > PACK // 2:
            yield places, packed(data, places, len(places))
            places = []
        places.append(place)
    yield places, packed(data, places, len(places))


def losses(world: World, rows: Sequence[Row], model: Any, use: Callable[[list[int], Batch], None] = lambda _places, _batch: None) -> Losses:
    """Nats and tokens (N, 2) of ``rows``; ``use`` is told each batch before it runs."""
    found = np.zeros((len(rows), 2))
    with torch.no_grad():
        for places, batch in batches(world, rows):
            use(places, batch)
            nats, whose = token_losses(model, batch).double().numpy(), owners(batch).numpy()
            np.add.at(found, (np.array(places)[whose], 0), nats)
            np.add.at(found, (np.array(places)[whose], 1), 1.0)
    return found


def singly(world: World, adapter: Adapter | None) -> dict[str, Losses]:
    """Every task's test rows under one adapter, or the base."""
    if adapter is None:
        return {name: losses(world, rows, world.base.model) for name, rows in world.test.items()}
    with attach(world.base, adapter.spec) as live:
        live.load(adapter.tensors)
        live.model.eval()
        return {name: losses(world, rows, live.model) for name, rows in world.test.items()}


def bank(world: World) -> Bank:
    """All adapters at once."""
    return Bank.attach(world.base, Generation("any").head, world.adapters)


def by_tokens(world: World, router: TokenRouter) -> dict[str, Losses]:
    """Every token of every module chooses."""
    with bank(world) as every:
        every.use(routed(router))
        return {name: losses(world, rows, every.model) for name, rows in world.test.items()}


def by_weights(world: World, weights: Weights) -> dict[str, Losses]:
    """Every row under its own mixture."""
    found = {}
    with bank(world) as every:
        for name, rows in world.test.items():
            table = torch.tensor([list(weights(name, place)) for place in range(len(rows))], dtype=torch.float32)
            found[name] = losses(world, rows, every.model, lambda places, batch, table=table: _spread(world, every, table[places], batch))
    return found


def _spread(world: World, every: Bank, table: torch.Tensor, batch: Batch) -> None:
    row = (batch.inputs["position_ids"][0] == 0).cumsum(0) - 1
    every.use(Gates.tokens(list(world.adapters), table[row][None]))


def few_shot(world: World) -> dict[str, dict[str, float]]:
    """Mixture weights of every task, fitted by search on a few of its training rows."""
    found, names = {}, list(world.adapters)
    with bank(world) as every:
        for name, rows in world.train.items():
            ((_, batch), *_) = batches(world, rows[-FEW:])

            def loss(weights: NDArray[np.float64], batch: Batch = batch) -> float:
                table = torch.tensor(weights, dtype=torch.float32).expand(batch.inputs["input_ids"].shape[1], -1)
                every.use(Gates.tokens(names, table[None]))
                with torch.no_grad():
                    return float(token_losses(every.model, batch).mean())

            found[name] = dict(FewShot(evaluations=80).fit(names, loss).mixture)
    return found
