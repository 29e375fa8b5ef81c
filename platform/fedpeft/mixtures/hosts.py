"""The module that hosts adapters: its own forward still runs, and what the mixture adds comes on top.

Layers of one family (query, key and value of one attention) are called one after the other with the same tensor; the first call answers for
all of them, as in `methods.fused`. Nothing is wrapped: only the instance's ``forward`` is set, and taken away again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.errors import AdapterError
from fedpeft.methods.blends.experts import top_weights
from fedpeft.methods.frozen import Frozen
from fedpeft.methods.targets import families, is_linear, linear_roles
from fedpeft.mixtures.choice import Shape, way_for
from fedpeft.mixtures.dense import CHILD, Holder
from fedpeft.mixtures.mixing import Addend, Factors, mix
from fedpeft.mixtures.plans import Share, per_token
from fedpeft.mixtures.slabs import Slab
from fedpeft.mixtures.state import State


@dataclass(frozen=True, eq=False)
class Work:
    """What the layers of a family do under one mixture: the members that it acts on, and their addends."""

    members: tuple[Host, ...]
    shares: tuple[Share, ...]
    addends: tuple[Addend, ...]
    fused: bool

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all members for ``x`` (..., I), base and low-rank products in one function."""
        for share in self.shares:
            per_token(share.plan, x.numel() // x.shape[-1], self.members[0].name)
        dtype = _dtype(x)
        bases = [member.frozen.base(dtype) for member in self.members]
        return mix(x.to(dtype), [member.frozen.width for member in self.members], bases, self.addends)


class Family:
    """Hosts that read one input, and the answers that the first of them prepared for the others."""

    def __init__(self) -> None:
        self.members: list[Host] = []
        self._work: tuple[tuple[object, ...], Work] | None = None
        self._ready: tuple[Tensor, tuple[object, ...], dict[Host, Tensor]] | None = None

    def answer(self, member: Host, x: Tensor) -> Tensor:
        """The output of ``member`` for ``x``, prepared or computed."""
        key = (x._version, member.state.version, member.layer.training, torch.is_grad_enabled())
        ready = self._ready
        if ready is None or ready[0] is not x or ready[1] != key or member not in ready[2]:
            work = self._work_of(member, x)
            if member not in work.members:
                return cast(Tensor, member.base(x))
            if not work.fused:
                return member.alone(x, [share for share in work.shares if member.name in share.slab.parts])
            ready = (x, key, dict(zip(work.members, work.run(x), strict=True)))
        found = ready[2].pop(member)
        self._ready = ready if ready[2] else None
        return found

    def _work_of(self, member: Host, x: Tensor) -> Work:
        """Kept as long as mixture and mode stay; the factors of a dense bank are made anew, as they are part of a graph."""
        key = (member.state.version, member.layer.training, x.shape, _dtype(x), torch.is_grad_enabled())
        if self._work is None or self._work[0] != key or member.holder is not None:
            names = {other.name for other in self.members}
            shares = tuple(share for share in member.state.fixed if names & share.slab.parts.keys())
            members = tuple(other for other in self.members if any(other.name in share.slab.parts for share in shares))
            fused = all(other.here(x) and all(_plain(share, other.name) for share in shares) for other in members)
            addends = tuple(addend for share in shares for addend in _addends(x, members, share)) if fused else ()
            self._work = (key, Work(members, shares, addends, fused))
        return self._work[1]


def families_of(model: nn.Module) -> dict[str, Family]:
    """The family of every linear layer that reads the same input as others, by the layer's name."""
    names = [name for name in linear_roles(model) if is_linear(model.get_submodule(name))]
    found: dict[str, Family] = {}
    for group in families(model, names):
        found |= dict.fromkeys(group, Family())
    return found


class Host:
    """The forward of one module under a mixture."""

    def __init__(self, name: str, layer: Any, state: State, family: Family) -> None:
        self.name, self.layer, self.state, self.family = name, layer, state, family
        self.holder = Holder() if state.dense else None
        self.before = layer.__dict__.get("forward")
        self.base = layer.forward
        self.frozen = Frozen(layer)
        family.members.append(self)
        object.__setattr__(layer, "forward", self)
        if self.holder is not None:
            layer.add_module(CHILD, self.holder)

    def release(self) -> None:
        """Give the module its own forward back."""
        object.__delattr__(self.layer, "forward")
        if self.holder is not None:
            delattr(self.layer, CHILD)
        if self.before is not None:
            object.__setattr__(self.layer, "forward", self.before)

    def factor(self, slab: Slab, name: str) -> Tensor:
        """The tensor ``name`` of all rows (T, ...), for autograd's own functions."""
        return slab.factor(name) if self.holder is None else cast(Tensor, self.holder(slab, name))

    def product(self, place: int, slab: Slab, a: str, b: str) -> Factors:
        """The factors of one product, for layer number ``place`` of `mix`."""
        if self.holder is not None:
            return Factors(place, self.holder(slab, a), self.holder(slab, b))
        return Factors(place, slab.stacked(a), slab.stacked(b), slab.sink(a), slab.sink(b))

    def here(self, x: Tensor) -> bool:
        """Whether other layers' calls may compute this one for ``x``; ZeRO-3 has its weight here in the layer's own call alone."""
        if self.before is not None or hasattr(getattr(self.layer, "weight", None), "ds_id"):
            return False
        return self.frozen.readable(_dtype(x), torch.is_autocast_enabled(x.device.type))

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """X (..., I) -> (..., O), or what the module gives."""
        if args or kwargs:
            return self._called_otherwise(x, args, kwargs)
        if self.state.routed:
            shares = self.state.shares(self.name, x)
            y = self.alone(x, shares) if shares else self.base(x)
        else:
            y = self.family.answer(self, x)
        return y if self.holder is None else self.holder.idle(y, self.state.resting(self.name))

    def alone(self, x: Tensor, shares: Sequence[Share]) -> Tensor:
        """The output of this layer, whatever acts on it."""
        for share in shares:
            per_token(share.plan, x.numel() // x.shape[-1], self.name)
        gain = self._blend(shares, "gain_in", x)
        y: Tensor = self.base(x if gain is None else x * gain)
        own, gain, shift = y, self._blend(shares, "gain_out", y), self._blend(shares, "shift", y)
        y = y if gain is None else y * gain
        y = y if shift is None else y + shift
        addends = [addend for share in shares for addend in _addends(x, [self], share)]
        y = y + mix(x.to(_dtype(x)), [self.frozen.width], [None], addends)[0].to(own.dtype) if addends else y
        for share in shares:
            y = y + _routed(share, self, x, y) if share.slab.parts[self.name].experts else y
        for share in shares:
            y = y + _squeeze(share, self, y) if share.slab.parts[self.name].squeeze else y
        return y

    def _called_otherwise(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.state.routed or any(self.name in share.slab.parts for share in self.state.fixed):
            raise AdapterError(
                f"mixture: {self.name} is called with more than its input, which no adapter there can follow; serve it alone"
            )
        return self.base(x, *args, **kwargs)

    def _blend(self, shares: Sequence[Share], what: str, like: Tensor) -> Tensor | None:
        """``1 + sum w (l - 1)``, or ``sum w (b - own)``, in a form that broadcasts to ``like`` (..., D); None where nothing acts."""
        total: Tensor | None = None
        for share in shares:
            name = getattr(share.slab.parts[self.name], what)
            if name is None:
                continue
            own = self.layer.bias if what == "shift" else 1.0
            deltas = self.factor(share.slab, name).flatten(1) - own
            part = _spread(share.matrix @ deltas, like).to(like.dtype)
            total = part if total is None else total + part
        return total if total is None or what == "shift" else 1.0 + total


def _dtype(x: Tensor) -> torch.dtype:
    """What low-rank products are computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


def _plain(share: Share, module: str) -> bool:
    """Whether a share does nothing at a module, or nothing but products."""
    part = share.slab.parts.get(module)
    return part is None or not (part.gain_in or part.gain_out or part.shift or part.squeeze or part.experts)


def _addends(x: Tensor, members: Sequence[Host], share: Share) -> list[Addend]:
    slab, found = share.slab, []
    for place, member in enumerate(members):
        for a, b in slab.parts[member.name].low if member.name in slab.parts else ():
            found.append(member.product(place, slab, a, b))
    if not found:
        return []
    rank, width = found[0].a.shape[1:]
    training = torch.is_grad_enabled() and slab.trained
    shape = Shape(x.numel() // x.shape[-1], _dtype(x), rank, width, found[0].b.shape[1], training)
    state = members[0].state
    way, weights = way_for(share, state.way, shape, state.choices)
    return [Addend(way, tuple(found), weights, slab.dropout if members[0].layer.training else 0.0)]


def _routed(share: Share, host: Host, x: Tensor, y: Tensor) -> Tensor:
    """``sum_e w_e(x) B_e A_e x`` in float32, of each slot over its own tokens: each adapter's router weighs its own experts."""
    experts = share.slab.parts[host.name].experts
    assert experts is not None
    router = host.factor(share.slab, experts.router)
    down, up = (torch.stack([host.factor(share.slab, name) for name in names], 1) for names in (experts.down, experts.up))
    flat = x.reshape(-1, x.shape[-1]).float()
    total = flat.new_zeros(len(flat), y.shape[-1])
    for tokens, slots, weights in share.plan.batches(len(flat)):
        own = (flat if tokens is None else flat.index_select(0, tokens)).view(len(router[slots]), -1, flat.shape[1])
        shares = top_weights(torch.bmm(own, router[slots].transpose(1, 2)), experts.top or len(experts.up))
        low = torch.bmm(own, down[slots].flatten(1, 2).transpose(1, 2)).view(*own.shape[:2], len(experts.down), -1)
        out = torch.bmm((low * shares.unsqueeze(-1)).flatten(2), up[slots].transpose(2, 3).flatten(1, 2)).flatten(0, 1).float()
        out = out if weights is None else out * weights.unsqueeze(1)
        total = total + out if tokens is None else total.index_add(0, tokens, out)
    return total.view(y.shape).to(y.dtype)


def _squeeze(share: Share, host: Host, y: Tensor) -> Tensor:
    """``sum w up(gelu(down(y)))``, summed in float32, of each slot over its own tokens; autocast may multiply in less."""
    tensors = [host.factor(share.slab, name) for name in share.slab.parts[host.name].squeeze or ()]
    flat = y.reshape(-1, y.shape[-1]).float()
    total = torch.zeros_like(flat)
    for tokens, slots, weights in share.plan.batches(len(flat)):
        down, down_bias, up, up_bias = (tensor[slots] for tensor in tensors)
        part = flat if tokens is None else flat.index_select(0, tokens)
        inner = F.gelu(torch.baddbmm(down_bias.unsqueeze(1), part.view(len(down), -1, part.shape[1]), down.transpose(1, 2)))
        out = torch.baddbmm(up_bias.unsqueeze(1), inner, up.transpose(1, 2)).view(-1, flat.shape[1]).float()
        out = out if weights is None else out * weights.unsqueeze(1)
        total = total + out if tokens is None else total.index_add(0, tokens, out)
    return total.view(y.shape).to(y.dtype)


def _per_token(matrix: Tensor, tokens: int) -> Tensor:
    return matrix.repeat_interleave(tokens // len(matrix), 0)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """(U, D) -> a shape that broadcasts to ``like`` (..., D)."""
    if values.shape[0] == 1 or values.shape[0] * values.shape[1] == like.numel():
        return values.view(*([1] * (like.dim() - 1) if len(values) == 1 else like.shape[:-1]), values.shape[1])
    if like.dim() > 2 and values.shape[0] == like.shape[0]:
        return values.view(len(values), *[1] * (like.dim() - 2), values.shape[1])
    return _per_token(values, like.numel() // like.shape[-1]).view(like.shape)
