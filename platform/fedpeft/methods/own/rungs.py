"""The live half of ladder side tuning: every block's states are noted, and the last block's hook climbs the ladder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import begin
from fedpeft.methods.grafts import Own, blocks, graft, hidden, with_hidden

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec

SHARPNESS = 10.0
"""Of the gate ``sigmoid(10 a)``: the paper's temperature of 0.1."""


def add_ladder(model: nn.Module, head: HeadSpec, reduction: int) -> None:
    """A ladder beside the last stack of blocks. Raises `AdapterError` when ``reduction`` leaves no width."""
    found = _last_stack(blocks(model))
    width = next(iter(found.values()))
    side = width // reduction
    if side == 0 or len(set(found.values())) > 1:
        raise AdapterError(f"lst: blocks of {type(model).__name__} are {sorted(set(found.values()))} wide; lower reduction = {reduction}")
    attached, seen = begin(model, "lst", head), dict[str, Tensor]()
    rungs: dict[str, Own] = {}
    for name in found:
        last = name == next(reversed(found))
        act = partial(_climb, rungs, seen) if last else partial(_note, seen, name)
        rungs[name] = graft(attached, model, f"{name}.lst", _shapes(width, side, not rungs, last), act)
    attached.undo.append(seen.clear)


def _shapes(width: int, side: int, first: bool, last: bool) -> dict[str, tuple[int, ...]]:
    rung: dict[str, tuple[int, ...]] = {"ladder.weight": (side, width), "rung.weight": (side, side)}
    return rung | ({} if first else {"gate": (1,)}) | ({"top.weight": (width, side)} if last else {})


def _last_stack(found: Mapping[str, int]) -> dict[str, int]:
    stack = next(reversed(found.keys())).rpartition(".")[0]  # type: ignore[call-overload]
    return {name: width for name, width in found.items() if name.rpartition(".")[0] == stack}


def _note(seen: dict[str, Tensor], name: str, own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    seen[name] = hidden(output).detach()


def _climb(rungs: dict[str, Own], seen: dict[str, Tensor], own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """The states stay noted while gradients are on: activation checkpointing calls the last block once more."""
    top = hidden(output).detach()
    state: Tensor | None = None
    for name, rung in rungs.items():
        state = _step(rung, seen.get(name, top), state)
    if not torch.is_grad_enabled():
        seen.clear()
    assert state is not None
    return with_hidden(output, top + F.linear(state, own["top.weight"]).to(top.dtype))


def _step(rung: Own, states: Tensor, below: Tensor | None) -> Tensor:
    read = F.linear(F.layer_norm(states.float(), states.shape[-1:]), rung["ladder.weight"])
    mixed = read if below is None else torch.lerp(read, below, torch.sigmoid(SHARPNESS * rung["gate"]))
    return mixed + F.linear(F.gelu(mixed), rung["rung.weight"])
