"""Which part of an activation belongs to which example, and the gradients of the examples one by one.

A gradient of a matrix is ``sum_t left_t right_t'`` over the tokens t of an example. It is kept as the product or as the two
factors, whichever is smaller; the same comparison decides which norm is cheaper, because ``|left' right|^2`` is the sum of the
elementwise product of the tokens' two Gram matrices (ghost norms: Goodfellow 2015, arXiv 1510.01799; Li et al. 2021, arXiv 2110.05679).

Shape legend: N examples, T tokens of an example, M and K widths of left and right, W a width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedpeft.errors import PrivacyError

Parts = Tensor | Sequence[Tensor]
"""One (T, W) for each example; a tensor (N, T, W) where all T are equal."""


@dataclass(frozen=True)
class Rows:
    """The examples of one forward: rows of a padded batch, or with ``lengths`` consecutive tokens of one packed row."""

    count: int
    lengths: tuple[int, ...] | None = None

    def split(self, x: Tensor) -> Parts:
        """Rows (N, ..., W), (1, tokens, ..., W), or either with its leading axes made one -> the examples' parts, all views.

        Raises:
            PrivacyError: the leading axes are neither.
        """
        tokens = sum(self.lengths or ())
        if self.lengths and (x.shape[0] == tokens if x.dim() == 2 else x.shape[:2] == (1, tokens)):
            per = x.numel() // (tokens * x.shape[-1])
            return torch.split(x.reshape(-1, x.shape[-1]), [length * per for length in self.lengths])
        if x.shape[0] == self.count or (x.dim() == 2 and x.shape[0] % self.count == 0):
            return x.reshape(self.count, -1, x.shape[-1])
        raise PrivacyError(
            f"example-level privacy: an activation of shape {list(x.shape)} cannot be told apart into {self.count} examples; "
            "use lora or ia3, or client-level privacy"
        )


class PerExample(Protocol):
    """The gradients of one tensor, one for each example."""

    def squares(self) -> Tensor:
        """Squared norms (N,)."""

    def weighted(self, weights: Tensor) -> Tensor:
        """The sum over the examples under ``weights`` (N,), with the tensor's number of values."""

    def dense(self) -> Tensor:
        """All of them, (N, values)."""


@dataclass(frozen=True, eq=False)
class Whole:
    """Gradients as they are: ``values`` (N, ...); ``turned``: each is the transpose (K, M) of the tensor's (M, K)."""

    values: Tensor
    turned: bool = False

    def squares(self) -> Tensor:
        """See `PerExample.squares`."""
        norms: Tensor = torch.linalg.vector_norm(self.values.flatten(1), dim=1)
        return norms.square_()

    def weighted(self, weights: Tensor) -> Tensor:
        """See `PerExample.weighted`."""
        total = torch.mv(self.values.flatten(1).t(), weights.to(self.values.dtype)).view(self.values.shape[1:])
        return total.t() if self.turned else total

    def dense(self) -> Tensor:
        """See `PerExample.dense`."""
        return (self.values.transpose(1, 2) if self.turned else self.values).flatten(1)


@dataclass(frozen=True, eq=False)
class Factors:
    """Gradients ``left' right``, with the tokens' factors kept apart: (T, M) and (T, K) for each example."""

    left: Parts
    right: Parts

    def squares(self) -> Tensor:
        """See `PerExample.squares`."""
        if isinstance(self.left, Tensor) and isinstance(self.right, Tensor):
            return (_gram(self.left) * _gram(self.right)).sum((1, 2))
        return torch.stack([(_gram(one) * _gram(other)).sum() for one, other in zip(self.left, self.right, strict=True)])

    def weighted(self, weights: Tensor) -> Tensor:
        """See `PerExample.weighted`."""
        left = torch.cat([part * weight for part, weight in zip(self.left, weights.to(self.left[0].dtype), strict=True)])
        return left.t() @ torch.cat(list(self.right))

    def dense(self) -> Tensor:
        """See `PerExample.dense`."""
        return _products(self.left, self.right).flatten(1)


def outer(left: Parts, right: Parts) -> PerExample:
    """Gradients ``left' right`` (M, K) of every example, in the smaller of the two forms."""
    left, right = _wide(left), _wide(right)
    tokens, m, k = sum(len(part) for part in left), left[0].shape[-1], right[0].shape[-1]
    if tokens * (m + k) < len(left) * m * k:
        return Factors(left, right)
    return Whole(_products(right, left), turned=True) if k < m else Whole(_products(left, right))


def total(x: Parts) -> PerExample:
    """Sums (W,) over the tokens of every example."""
    x = _wide(x)
    return Whole(x.sum(1) if isinstance(x, Tensor) else torch.stack([part.sum(0) for part in x]))


def scattered(places: Parts, x: Parts, rows: int) -> PerExample:
    """Gradients (rows, W) of a table that was read at ``places`` (T,): x (T, W) added there."""
    found = x[0].new_zeros(len(x), rows, x[0].shape[-1])
    for table, where, values in zip(found, places, x, strict=True):
        table.index_add_(0, where.reshape(-1), values)
    return Whole(found)


def _products(left: Parts, right: Parts) -> Tensor:
    """(N, M, K)."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.bmm(left.transpose(1, 2), right)
    found = left[0].new_empty(len(left), left[0].shape[-1], right[0].shape[-1])
    for product, one, other in zip(found, left, right, strict=True):
        torch.mm(one.t(), other, out=product)
    return found


def _gram(x: Tensor) -> Tensor:
    return torch.matmul(x, x.transpose(-1, -2))


def _wide(x: Parts) -> Parts:
    """In float32 at least."""
    if isinstance(x, Tensor):
        return x if x.dtype in (torch.float32, torch.float64) else x.float()
    return x if x[0].dtype in (torch.float32, torch.float64) else [part.float() for part in x]
