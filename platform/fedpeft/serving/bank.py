"""The shape of a bank of adapters that serving needs, and gates from mixtures; `fedpeft.mixtures` holds the real one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fedpeft.adapters import Adapter
from fedpeft.serving.requests import Mixture


class Bank(Protocol):
    """Adapters on one model, chosen row by row."""

    @property
    def model(self) -> Any:
        """The model to call."""
        ...

    def use(self, gates: Any) -> None:
        """Which adapters act on which row of the next forwards."""
        ...

    def put(self, name: str, adapter: Adapter) -> None:
        """Add an adapter. Raises `AdapterError` when it cannot run beside others."""
        ...

    def remove(self, name: str) -> None:
        """Take one away."""
        ...


def gates(mixtures: Sequence[Mixture]) -> Any:
    """The gates of a batch with one mixture a row: by name where no row has more than one adapter, of weight 1; else by weight."""
    from fedpeft.mixtures import Gates

    if not any(mixtures):
        return Gates()
    if all(not mixture or (len(mixture) == 1 and next(iter(mixture.values())) == 1.0) for mixture in mixtures):
        return Gates.rows([next(iter(mixture), None) for mixture in mixtures])
    names = sorted({name for mixture in mixtures for name in mixture})
    return Gates.weights(names, torch.tensor([[mixture.get(name, 0.0) for name in names] for mixture in mixtures]))
