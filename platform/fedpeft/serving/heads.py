"""Classification heads on one mixed forward of the trunk: each task's shell reads its own rows of what the trunk gave for all.

Shape suffixes: N rows, T tokens, K labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedpeft.adapters import Adapter
from fedpeft.methods.values import PREFIX
from fedpeft.tensors import Layout, Tensors

if TYPE_CHECKING:
    from fedpeft.bases import Base, HeadSpec


class Given(nn.Module):
    """Stands where a shell has its trunk, and answers with what the trunk gave already."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None

    def forward(self, *_inputs: Any, **_settings: Any) -> Any:
        """The rows that were put here."""
        return self.output


class Heads:
    """The heads of the classification adapters that are served, by the adapter's name."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._shells: dict[str, tuple[Any, Given]] = {}

    def put(self, name: str, adapter: Adapter) -> None:
        """Build the head of ``adapter``; the trunk is neither copied nor touched."""
        from fedpeft.bases.shell import shell

        model: Any = shell(self._base, adapter.spec.head)
        given = Given()
        setattr(model, model.base_model_prefix, given)
        _fill(model, adapter)
        self._shells[name] = (model, given)

    def remove(self, name: str) -> None:
        """Forget a head."""
        self._shells.pop(name, None)

    @torch.no_grad()
    def logits(self, output: Any, inputs: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
        """The logits (K,) of every row, float32, from the trunk's ``output`` for ``inputs`` (N, T); row n belongs to ``names[n]``."""
        found: list[Tensor] = [torch.empty(0)] * len(names)
        for name in dict.fromkeys(names):
            places = [place for place, owner in enumerate(names) if owner == name]
            model, given = self._shells[name]
            given.output = rows_of(output, places)
            answers = model(**{key: value[places] for key, value in inputs.items()}).logits.float().cpu()
            given.output = None
            for place, row in zip(places, answers, strict=True):
                found[place] = row
        return found


def bare(adapter: Adapter, base: Base, head: HeadSpec) -> Adapter:
    """The adapter without its head's tensors, as the bank takes it: a base that writes serves text and labels in one mixed batch."""
    named, unnamed = adapter.tensors.named(), _unnamed(base, head)
    kept = {
        name.replace(unnamed, PREFIX, 1): entry for entry in adapter.spec.layout.entries if entry.role != "head" for name in [entry.name]
    }
    layout = Layout.of([dataclasses.replace(entry, name=name) for name, entry in kept.items()])
    spec = dataclasses.replace(adapter.spec, head=head, layout=layout)
    return Adapter(spec, Tensors.from_named(layout, {name: named[entry.name] for name, entry in kept.items()}))


def _unnamed(base: Base, head: HeadSpec) -> str:
    """What the names of a classifier's tensors begin with that is not there in the model with ``head``: T5's holds its parts itself."""
    trunk = f"{base.model.base_model_prefix}."
    return PREFIX + (trunk if head.kind == "lm" and not hasattr(base.model, trunk[:-1]) else "")


def rows_of(output: Any, places: Sequence[int]) -> Any:
    """The same kind of output for some of its rows."""
    chosen = list(places)
    return type(output)(**{key: value[chosen] if isinstance(value, Tensor) else value for key, value in output.items()})


def _fill(model: nn.Module, adapter: Adapter) -> None:
    named = adapter.tensors.named()
    with torch.no_grad():
        for entry in adapter.spec.layout.entries:
            if entry.role == "head":
                target = model.get_parameter(entry.name.removeprefix("base_model.model."))
                target.copy_(torch.from_numpy(named[entry.name].copy()))
