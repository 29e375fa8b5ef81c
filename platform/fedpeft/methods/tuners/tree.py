"""A module tree as it was: which modules, parameters, buffers, hooks and own attributes every module had, put back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedpeft.methods.attached import MARK

HELD = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
KEPT = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


@dataclass(frozen=True)
class Place:
    """One module: what its dictionaries held, the names of its attributes, and its own ``forward`` if it had one."""

    module: nn.Module
    held: Mapping[str, dict[Any, Any]]
    names: frozenset[str]
    forward: Any

    @staticmethod
    def of(module: nn.Module) -> Place:
        """What ``module`` holds now; nothing is copied but references."""
        held = {name: dict(getattr(module, name)) for name in (*HELD, *KEPT)}
        return Place(module, held, frozenset(vars(module)), vars(module).get("forward"))

    def restore(self) -> None:
        """Put it back; dictionaries stay the same objects, since handles of hooks point at them."""
        for name, was in self.held.items():
            now = getattr(self.module, name)
            if _marks(now) != _marks(was):
                now.clear()
                now.update(was)
        for name in set(vars(self.module)) - self.names - {MARK}:
            object.__delattr__(self.module, name)
        if self.forward is not None:
            object.__setattr__(self.module, "forward", self.forward)


@dataclass(frozen=True)
class Tree:
    """Every module below one, and the storage of every parameter."""

    places: tuple[Place, ...]
    data: tuple[tuple[nn.Parameter, torch.Tensor], ...]

    @staticmethod
    def of(model: nn.Module) -> Tree:
        """The tree of ``model`` now."""
        return Tree(tuple(map(Place.of, model.modules())), tuple((p, p.data) for p in model.parameters()))

    def restore(self) -> None:
        """Put everything back that was swapped, added or hooked since; values written in place are not undone."""
        for place in self.places:
            place.restore()
        for parameter, data in self.data:
            if parameter.data is not data and parameter.data_ptr() != data.data_ptr():
                parameter.data = data


def _marks(table: Mapping[Any, Any]) -> list[tuple[Any, int]]:
    return [(key, id(value)) for key, value in table.items()]
