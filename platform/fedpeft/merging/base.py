"""What a merge rule is, and what all merges check and share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, Protocol

from fedpeft.adapters.spec import Adapter, AdapterSpec
from fedpeft.errors import AdapterError
from fedpeft.factors import Product, Truncated, truncate
from fedpeft.tensors import Flat


@dataclass(frozen=True)
class Merged:
    """The merged adapter, and ``lost``: the share of the energy of the rule's own result that cutting its rank dropped."""

    adapter: Adapter
    lost: float = 0.0


class Rule(Protocol):
    """How several task vectors become one; weights are taken as they are, never normalised."""

    kind: ClassVar[str]

    def product(self, terms: Sequence[tuple[float, Product]], name: str) -> Truncated:
        """The merged product of one module of LoRA, of any rank; all modules of one merge give the same rank.

        ``terms`` hold one product per adapter; ``name`` is the module's, for seeds.
        """
        ...

    def vector(self, terms: Sequence[tuple[float, Flat]], name: str) -> Flat:
        """The merged task vector of a method whose weights are linear in its tensors: all tensors of one role."""
        ...


def cut(terms: Sequence[Product], rank: int | None, like: Sequence[tuple[float, Product]]) -> Truncated:
    """The sum of ``terms`` at ``rank``; None: the largest rank among ``like``."""
    return truncate(terms, rank or max(len(product.a) for _, product in like))


def check(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    """Refuse what cannot be merged by any rule.

    Raises:
        AdapterError: fewer than one adapter, a weight missing or not finite, or different bases, methods or heads.
    """
    if not adapters or len(weights) != len(adapters) or not all(map(isfinite, weights)):
        raise AdapterError(f"merge: {len(adapters)} adapter(s) with weights {list(weights)}; give one finite weight for each adapter")
    first = adapters[0].spec
    for adapter in adapters[1:]:
        _same(first, adapter.spec, "base", (first.base_model, adapter.spec.base_model), first.base == adapter.spec.base)
        kinds = (first.method.kind, adapter.spec.method.kind)
        _same(first, adapter.spec, "method", kinds, kinds[0] == kinds[1])
        heads = (list(first.head.labels), list(adapter.spec.head.labels))
        _same(first, adapter.spec, "head", heads, first.head == adapter.spec.head)


def _same(one: AdapterSpec, two: AdapterSpec, what: str, values: tuple[object, object], equal: bool) -> None:
    if not equal:
        raise AdapterError(
            f"merge: {one.task} and {two.task} differ in their {what} ({values[0]} and {values[1]}); merge adapters of one {what}, "
            "or serve both in a mixture"
        )
