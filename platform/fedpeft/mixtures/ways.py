"""Ways to multiply tokens with each one's own factors, equal in result; which one runs is `choice`'s business.

All that a low-rank product needs, forward and backward, is four products; transposed factors give the other direction:
``h = x a'`` and ``g b`` are `down`, ``y += h b'`` and ``x' += h a`` are `up`, the factors' gradients `grad_a` and `grad_b`.

Shape legend: N tokens, n = M S tokens of pairs, I and O widths, R rank, T slots, E experts; factors a (T, R, I), b (T, O, R).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fedpeft.mixtures.plans import Blend, Pairs


class Way(Protocol):
    """One way, bound to its plan."""

    def take(self, x: Tensor) -> Tensor:
        """The tokens (n, D) that the other products read, of all (N, D)."""

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """X (n, I) by a (T, R, I) -> h: (n, R), or (N, E R) where every expert sees every token."""

    def up(self, y: Tensor, h: Tensor, b: Tensor) -> None:
        """Add h by b (T, O, R) to y (N, O)."""

    def grad_a(self, h: Tensor, x: Tensor, into: Tensor) -> None:
        """Add ``h' x`` of every slot to ``into`` (T, R, I)."""

    def grad_b(self, g: Tensor, h: Tensor, into: Tensor) -> None:
        """Add ``g' h`` of every slot to ``into`` (T, O, R)."""

    def weigh(self, h: Tensor, w: Tensor) -> Tensor:
        """H times the weight of its pair."""

    def grad_w(self, gh: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """The gradient of ``w``, from that of the weighed h and h itself."""


class _Paired:
    """What ways over sorted pairs share."""

    def __init__(self, plan: Pairs) -> None:
        self.plan = plan

    def take(self, x: Tensor) -> Tensor:
        """See `Way.take`."""
        return self.plan.take(x)

    def weigh(self, h: Tensor, w: Tensor) -> Tensor:
        """See `Way.weigh`."""
        return (h.reshape(len(w), -1) * w.unsqueeze(1)).view(h.shape)

    def grad_w(self, gh: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """See `Way.grad_w`."""
        return (gh * h).reshape(len(w), -1).sum(1)

    def grad_a(self, h: Tensor, x: Tensor, into: Tensor) -> None:
        """See `Way.grad_a`."""
        self._outer(h, x, into)

    def grad_b(self, g: Tensor, h: Tensor, into: Tensor) -> None:
        """See `Way.grad_b`."""
        self._outer(g, h, into)

    def _outer(self, p: Tensor, q: Tensor, into: Tensor) -> None:
        """Add ``p' q`` of every slot to ``into`` (T, P, Q)."""
        raise NotImplementedError


class Batched(_Paired):
    """One batched product: over neighbouring slots with equally many rows each, else over pairs with gathered factors."""

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """See `Way.down`."""
        part = self._factors(a)
        return torch.bmm(x.view(len(part), -1, x.shape[1]), part.transpose(1, 2)).view(-1, a.shape[1])

    def up(self, y: Tensor, h: Tensor, b: Tensor) -> None:
        """See `Way.up`."""
        part = self._factors(b)
        h = h.view(len(part), -1, h.shape[1])
        if isinstance(self.plan.place, slice):
            self.plan.take(y).view(len(part), -1, y.shape[1]).baddbmm_(h, part.transpose(1, 2))
        else:
            self.plan.give(y, torch.bmm(h, part.transpose(1, 2)).view(-1, y.shape[1]))

    def _factors(self, a: Tensor) -> Tensor:
        found = self.plan.uniform
        if found is None:
            return a.index_select(0, self.plan.slots)
        return a if found[1] - found[0] == len(a) else a[found[0] : found[1]]

    def _outer(self, p: Tensor, q: Tensor, into: Tensor) -> None:
        found = self.plan.uniform
        count = len(self.plan.slots) if found is None else found[1] - found[0]
        left, right = p.view(count, -1, p.shape[1]).transpose(1, 2), q.view(count, -1, q.shape[1])
        if found is None or into.dtype != p.dtype:
            slots = self.plan.slots if found is None else torch.arange(found[0], found[1], device=into.device)
            into.index_add_(0, slots, torch.bmm(left, right).to(into.dtype))
        else:
            # B's gradient is the product of a wide and a narrow matrix, which is faster as its transpose: (R, n) by (n, O)
            turned = p.shape[1] > q.shape[1]
            part = torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2) if turned else torch.bmm(left, right)
            into[found[0] : found[1]].add_(part)


class Segments(_Paired):
    """One product per slot, over its run of tokens."""

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """See `Way.down`."""
        h = x.new_empty(len(x), a.shape[1])
        for slot, part in self._runs(len(x)):
            torch.mm(x[part], a[slot].t(), out=h[part])
        return h

    def up(self, y: Tensor, h: Tensor, b: Tensor) -> None:
        """See `Way.up`."""
        straight = isinstance(self.plan.place, slice)
        z = self.plan.take(y) if straight else y.new_zeros(len(h), y.shape[1])
        for slot, part in self._runs(len(h)):
            z[part].addmm_(h[part], b[slot].t())
        if not straight:
            self.plan.give(y, z)

    def _outer(self, p: Tensor, q: Tensor, into: Tensor) -> None:
        for slot, part in self._runs(len(p)):
            if into.dtype == p.dtype:
                into[slot].addmm_(p[part].t(), q[part])
            else:
                into[slot].add_(p[part].t() @ q[part])

    def _runs(self, tokens: int) -> list[tuple[int, slice]]:
        span, start, found = tokens // len(self.plan.slots), 0, []
        for slot, count in self.plan.runs:
            found.append((slot, slice(start, start + count * span)))
            start += count * span
        return found


class Grouped(Segments):
    """torch's grouped product over all slots, those without tokens too; products that it does not take go segment by segment."""

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """See `Way.down`."""
        if not _takes(x, a):
            return super().down(x, a)
        return torch.nn.functional.grouped_mm(x, a.transpose(1, 2), offs=self._ends(len(x)))

    def up(self, y: Tensor, h: Tensor, b: Tensor) -> None:
        """See `Way.up`."""
        if not _takes(h, b):
            super().up(y, h, b)
        else:
            self.plan.give(y, torch.nn.functional.grouped_mm(h, b.transpose(1, 2), offs=self._ends(len(h))))

    def _outer(self, p: Tensor, q: Tensor, into: Tensor) -> None:
        if not _takes(p, q):
            super()._outer(p, q, into)
        else:
            into.add_(torch.nn.functional.grouped_mm(p.t(), q, offs=self._ends(len(p))))

    def _ends(self, tokens: int) -> Tensor:
        return self.plan.ends * (tokens // len(self.plan.slots))


def _takes(*tensors: Tensor) -> bool:
    """Whether the grouped product takes these operands: each has one contiguous axis, all others start at multiples of 16 bytes."""
    for tensor in tensors:
        strides = sorted(tensor.stride())
        if strides[0] != 1 or any(stride * tensor.element_size() % 16 for stride in strides[1:]) or tensor.data_ptr() % 16:
            return False
    return True


class Stacked:
    """All experts as one factor of rank E R; the weights scale its activations (ALGORITHMS B1)."""

    def __init__(self, plan: Blend) -> None:
        self.plan = plan

    def take(self, x: Tensor) -> Tensor:
        """See `Way.take`."""
        return x

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """See `Way.down`."""
        return x @ self._flat(a).t()

    def up(self, y: Tensor, h: Tensor, b: Tensor) -> None:
        """See `Way.up`."""
        y.addmm_(h, self._flat(b.transpose(1, 2)))

    def grad_a(self, h: Tensor, x: Tensor, into: Tensor) -> None:
        """See `Way.grad_a`."""
        self._add(into, (h.t() @ x).view(-1, *into.shape[1:]))

    def grad_b(self, g: Tensor, h: Tensor, into: Tensor) -> None:
        """See `Way.grad_b`."""
        self._add(into, (h.t() @ g).view(-1, into.shape[2], into.shape[1]).transpose(1, 2))

    def weigh(self, h: Tensor, w: Tensor) -> Tensor:
        """See `Way.weigh`."""
        units, experts = w.shape
        return (h.view(units, -1, experts, h.shape[1] // experts) * w.view(units, 1, experts, 1)).view_as(h)

    def grad_w(self, gh: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """See `Way.grad_w`."""
        units, experts = w.shape
        return (gh * h).view(units, -1, experts, h.shape[1] // experts).sum((1, 3))

    def _flat(self, factor: Tensor) -> Tensor:
        """(T, R, D) -> (E R, D)."""
        run, count = self.plan.run, len(self.plan.slots)
        part = factor.index_select(0, self.plan.slots) if run is None else factor[run : run + count]
        return part.reshape(-1, factor.shape[2])

    def _add(self, into: Tensor, gradient: Tensor) -> None:
        run, count = self.plan.run, len(self.plan.slots)
        if run is None:
            into.index_add_(0, self.plan.slots, gradient.to(into.dtype))
        else:
            into[run : run + count].add_(gradient)


class Loop:
    """The plain loop, for any plan: every slot's product over all tokens, times its column of the weights; what others must equal."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def take(self, x: Tensor) -> Tensor:
        """See `Way.take`."""
        return x

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """See `Way.down`."""
        return torch.cat([x @ factor.t() for factor in a], 1)

    def up(self, y: Tensor, h: Tensor, b: Tensor) -> None:
        """See `Way.up`."""
        for part, factor in zip(self._split(h), b, strict=True):
            y += part @ factor.t()

    def grad_a(self, h: Tensor, x: Tensor, into: Tensor) -> None:
        """See `Way.grad_a`."""
        for slot, part in enumerate(self._split(h)):
            into[slot] += part.t() @ x

    def grad_b(self, g: Tensor, h: Tensor, into: Tensor) -> None:
        """See `Way.grad_b`."""
        for slot, part in enumerate(self._split(h)):
            into[slot] += g.t() @ part

    def weigh(self, h: Tensor, w: Tensor) -> Tensor:
        """See `Way.weigh`."""
        spread = w.repeat_interleave(len(h) // len(w), 0)
        return torch.cat([part * spread[:, slot : slot + 1].to(h.dtype) for slot, part in enumerate(self._split(h))], 1)

    def grad_w(self, gh: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """See `Way.grad_w`."""
        per_token = torch.stack([part.sum(1) for part in self._split(gh * h)], 1)
        return per_token.view(len(w), -1, w.shape[1]).sum(1).to(w.dtype)

    def _split(self, h: Tensor) -> tuple[Tensor, ...]:
        return h.chunk(self.matrix.shape[1], 1)
