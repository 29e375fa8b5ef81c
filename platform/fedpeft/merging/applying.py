"""A rule applied to whole adapters, by what their method's tensors are to its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.spec import Adapter
from fedpeft.errors import AdapterError
from fedpeft.factors import Pair, Product, products, share_lost, stack
from fedpeft.merging import hidden
from fedpeft.merging.base import Merged, Rule, check
from fedpeft.merging.stacking import Cat, weighted
from fedpeft.tensors import Entry, Layout, Tensors

NEUTRAL = {("ia3", "scale"): 1.0, ("ssf", "scale"): 1.0, ("ssf", "shift"): 0.0}
"""Values that change nothing, by method and role; ``delta`` is 0 for every method."""


def merged(adapters: Sequence[Adapter], weights: Sequence[float], how: Rule, *, origin: Adapter | None = None, task: str = "") -> Merged:
    """One adapter for the weighted sum of ``adapters`` under ``how``; ranks, units and tokens may differ, targets may not.

    A classification head is averaged, weights normalised. ``origin`` is the adapter that all started from: task vectors of methods
    without neutral values are differences from it. ``task`` names the result (none given: the tasks' names joined by ``+``).

    Raises:
        AdapterError: bases, methods, heads or targets differ, the rule cannot merge this method, or ``origin`` is missing.
    """
    from fedpeft.methods import SPECS

    check(adapters, weights)
    spec, facts = adapters[0].spec, SPECS[adapters[0].spec.method.kind]
    lost = 0.0
    settings: Mapping[str, Any] = {}
    if spec.method.kind == "lora":
        body, settings, lost = _products(adapters, weights, how)
    elif facts.average == "linear":
        body = _vectors(adapters, weights, how, origin)
    elif isinstance(how, Cat) and facts.average == "hidden" and facts.trained == hidden.UNITS:
        body, settings = hidden.stacked_units(adapters, weights)
    elif isinstance(how, Cat) and facts.average == "prompt":
        body, settings = hidden.concatenated_tokens(adapters, weights)
    else:
        raise AdapterError(
            f"merge {how.kind}: is not defined for {spec.method.kind}, whose averaging is {facts.averaging}; "
            "use cat where units or tokens can be stacked, convert to LoRA first, or serve the adapters in a mixture"
        )
    name = task or "+".join(dict.fromkeys(adapter.spec.task for adapter in adapters))
    return Merged(_rebuilt(adapters[0], body | _head(adapters, weights), settings, name), lost)


def _products(adapters: Sequence[Adapter], weights: Sequence[float], how: Rule) -> tuple[dict[str, NDArray[Any]], dict[str, Any], float]:
    """LoRA: the whole product of every module, folds included, as plain factors of one rank."""
    whole = [_whole(adapter) for adapter in adapters]
    if any(set(found) != set(whole[0]) for found in whole):
        raise AdapterError("merge: the adapters act on different modules; merge adapters with the same targets")
    made = {pair: how.product([(w, found[pair]) for w, found in zip(weights, whole, strict=True)], pair.b) for pair in whole[0]}
    rank = max(len(found.a) for found in made.values())
    body = {name: value for pair, found in made.items() for name, value in _padded(pair, Product(found.b, found.a), rank).items()}
    method: Any = adapters[0].spec.method
    scale = method.scale * (sqrt(rank) if method.rslora else rank)
    return body, {"r": rank, "alpha": scale, "extra": 0}, share_lost(made.values())


def _whole(adapter: Adapter) -> dict[Pair, Product]:
    if "M" in adapter.tensors.layout.roles:
        raise AdapterError(f"merge: {adapter.spec.task} is DoRA, whose magnitudes have no sum; convert it to LoRA first")
    first, second = products(adapter.tensors), list(products(adapter.tensors, ("B2", "A2")).values())
    return {pair: stack([product, *second[i : i + 1]]) for i, (pair, product) in enumerate(first.items())}


def _padded(pair: Pair, product: Product, rank: int) -> dict[str, NDArray[Any]]:
    more = rank - len(product.a)
    return {pair.b: np.pad(product.b, ((0, 0), (0, more))), pair.a: np.pad(product.a, ((0, more), (0, 0)))}


def _vectors(adapters: Sequence[Adapter], weights: Sequence[float], how: Rule, origin: Adapter | None) -> dict[str, NDArray[Any]]:
    """Methods that are linear in their tensors: the rule on task vectors, role by role; tables of positions must agree."""
    from fedpeft.methods import SPECS

    layout = adapters[0].spec.layout
    if any(adapter.spec.layout != layout or adapter.spec.method != adapters[0].spec.method for adapter in adapters):
        raise AdapterError("merge: the adapters differ in their settings or tensors; merge adapters of equal settings and targets")
    out = Tensors(layout, adapters[0].tensors.flat.copy())
    for role in sorted(layout.roles - {"head"}):
        values = [adapter.tensors.pick({role}).flat for adapter in adapters]
        if role in SPECS[adapters[0].spec.method.kind].trained:
            start = _start(adapters[0], role, origin, weights, how)
            summed = how.vector([(w, value - start) for w, value in zip(weights, values, strict=True)], role)
            out = out.patch(Tensors(layout.subset({role}), summed + start))
        elif any((value != values[0]).any() for value in values):
            raise AdapterError(f"merge: the adapters differ in their {role!r}, which cannot be merged; train them with one mask")
    return {e.name: value for e, value in zip(layout.entries, out.named().values(), strict=True) if e.role != "head"}


def _start(adapter: Adapter, role: str, origin: Adapter | None, weights: Sequence[float], how: Rule) -> NDArray[np.float32]:
    """What task vectors of ``role`` are measured from; zeros where it cancels out of a plain mean."""
    layout, kind = adapter.spec.layout.subset({role}), adapter.spec.method.kind
    if origin is not None:
        if origin.spec.layout != adapter.spec.layout:
            raise AdapterError(f"merge: the origin {origin.spec.task} is of another layout; give the adapter that all started from")
        return origin.tensors.pick({role}).flat
    if role == "delta" or (kind, role) in NEUTRAL:
        return np.full(layout.size, NEUTRAL.get((kind, role), 0.0), np.float32)
    if isinstance(how, Cat) and abs(sum(weights) - 1.0) < 1e-6:
        return np.zeros(layout.size, np.float32)
    raise AdapterError(
        f"merge {how.kind}: {role!r} of {kind} has no neutral value to measure from; give the origin that all started from, "
        "or use cat with weights that add up to 1"
    )


def _head(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, NDArray[Any]]:
    """The weighted mean of the heads."""
    layout = adapters[0].spec.layout.subset({"head"})
    if not layout.entries:
        return {}
    if sum(weights) == 0:
        raise AdapterError(f"merge: weights {list(weights)} add up to 0, so the heads have no mean; give other weights")
    terms = [(w / sum(weights), adapter.tensors.pick({"head"}).flat) for w, adapter in zip(weights, adapters, strict=True)]
    return dict(Tensors(layout, weighted(terms)).named())


def _rebuilt(first: Adapter, named: Mapping[str, NDArray[Any]], settings: Mapping[str, Any], task: str) -> Adapter:
    """``named`` as an adapter like ``first``, its method with new ``settings``; tensors that are not named are gone."""
    roles = {entry.name: entry.role for entry in first.spec.layout.entries}
    layout = Layout.of([Entry(roles[name], name, tuple(value.shape)) for name, value in named.items()])
    method: Any = first.spec.method
    spec = replace(first.spec, task=task, layout=layout, method=replace(method, **settings) if settings else method)
    return Adapter(spec, Tensors.from_named(layout, named))
