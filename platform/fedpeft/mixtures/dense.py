"""The dense form of a bank: a parameter per adapter and tensor, registered in the model, of which every one takes part in every backward.

An engine that owns parameters (DeepSpeed) may move their values elsewhere, waits for a gradient of each, on every rank, and
gathers those of a module when the module is called (ZeRO 3). So the parameters of a host are those of a child of it, which is
called for them; what no row uses gets a gradient of zeros (CENTRAL.md: adapters are never switched).
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedpeft.mixtures.lanes import Lanes
from fedpeft.mixtures.slabs import Slab

CHILD = "mixture"
"""Name under which a host carries its parameters."""

Own = dict[str, nn.Parameter]


class Holder(nn.Module):
    """The parameters of one host: by slab, row and tensor name."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[tuple[int, str], dict[int, nn.Parameter]] = {}

    def put(self, slab: Slab, row: int, names: list[str]) -> Own:
        """Make parameters of the tensors ``names`` in ``row``: views of the slab, with gradients that are views as well."""
        found: Own = {}
        for name in names:
            span, shape = slab.spans[name]
            parameter = nn.Parameter(slab.values[row, span].view(shape), requires_grad=slab.trained)
            parameter.grad = slab.grads[row, span].view(shape)
            self.rows.setdefault((id(slab), name), {})[row] = parameter
            self.register_parameter(key_of(slab, row, name), parameter)
            found[name] = parameter
        return found

    def drop(self, slab: Slab, row: int) -> None:
        """Forget what lies in ``row``."""
        for (owner, name), held in self.rows.items():
            if owner == id(slab) and held.pop(row, None) is not None:
                delattr(self, key_of(slab, row, name))

    def forward(self, slab: Slab, name: str) -> Tensor:
        """The tensor ``name`` of all rows of a slab, (T, ...)."""
        if isinstance(slab, Lanes):
            return slab.split(name, self.rows[id(slab.source), name][slab.row])
        held = self.rows[id(slab), name]
        return cast(Tensor, Gather.apply(slab.view(name), list(held), *held.values()))  # type: ignore[no-untyped-call]

    def idle(self, y: Tensor, slabs: list[Slab]) -> Tensor:
        """``y``, on which what lies in ``slabs`` hangs with gradients of zeros."""
        wanted = {id(slab) for slab in slabs}
        resting = [parameter for (owner, _), held in self.rows.items() if owner in wanted for parameter in held.values()]
        return present(y, resting)


class Gather(torch.autograd.Function):
    """Parameters of several rows as one tensor: the slab itself while they lie there, else a copy of where they were moved to."""

    @staticmethod
    def forward(ctx: Any, view: Tensor, rows: list[int], *parameters: Tensor) -> Tensor:
        """(T, ...), zero in rows that nobody holds and whose values were moved."""
        ctx.rows = rows
        if all(parameter.data_ptr() == view[row].data_ptr() for row, parameter in zip(rows, parameters, strict=True)):
            return view[:]
        out = torch.zeros(view.shape, dtype=parameters[0].dtype, device=parameters[0].device)
        return out.index_copy_(0, torch.tensor(rows, device=out.device), torch.stack([p.detach() for p in parameters]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Each row's own."""
        return None, None, *[grad[row] for row in ctx.rows]


class Present(torch.autograd.Function):
    """A tensor on which others hang that it does not depend on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor) -> Tensor:
        """Y as it is."""
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Zeros for the others."""
        return grad, *[torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others]


def present(y: Tensor, others: list[nn.Parameter]) -> Tensor:
    """``y``, with gradients of zeros for ``others``."""
    return cast(Tensor, Present.apply(y, *others)) if others else y  # type: ignore[no-untyped-call]


def key_of(slab: Slab, row: int, name: str) -> str:
    """The parameter's name in its module: it may hold no dot, and two adapters may differ in dots alone."""
    adapter = re.sub(r"\W", "_", slab.names[row] or "")
    leaf = re.sub(r"\W", "_", ".".join(name.rsplit(".", 3)[-3:]))
    return f"{adapter}_{row}_{leaf}"
