"""The shape of a bank of adapters that serving needs, and gates from mixtures; `fedpeft.mixtures` holds the real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor

from fedpeft.adapters import Adapter
from fedpeft.serving.requests import Mixture, TokenMixture


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
    """The gates of a batch with one mixture a row: the sum of what rows weigh as a whole and of what their tokens weigh."""
    total = _whole([{} if isinstance(mixture, TokenMixture) else mixture for mixture in mixtures])
    for one in {id(mixture.gates): mixture.gates for mixture in mixtures if isinstance(mixture, TokenMixture)}.values():
        total = total + _within(one, [isinstance(mixture, TokenMixture) and mixture.gates is one for mixture in mixtures])
    return total


def _whole(mixtures: Sequence[Mixture]) -> Any:
    """By name where no row has more than one adapter, of weight 1; else by weight."""
    from fedpeft.mixtures import Gates

    if not any(mixtures):
        return Gates()
    if all(not mixture or (len(mixture) == 1 and next(iter(mixture.values())) == 1.0) for mixture in mixtures):
        return Gates.rows([next(iter(mixture), None) for mixture in mixtures])
    names = sorted({name for mixture in mixtures for name in mixture})
    return Gates.weights(names, torch.tensor([[mixture.get(name, 0.0) for name in names] for mixture in mixtures]))


def _within(routed: Any, rows: Sequence[bool]) -> Any:
    """``routed`` gates on the tokens of these rows alone: to all others nothing is ever chosen."""
    if all(rows):
        return routed
    (term,), others = routed.terms, ~torch.tensor(rows)

    def scores(module: str, x: Tensor) -> Tensor:
        """(N, E), for x (N, in) of all rows, one after the other."""
        left_out = others.to(x.device).repeat_interleave(len(x) // len(rows))
        found: Tensor = term.router(module, x).masked_fill(left_out.unsqueeze(1), -inf)
        return found

    return replace(routed, terms=(replace(term, router=scores),))
