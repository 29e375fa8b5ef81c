"""From gates by name to shares by slab: done once per `Bank.use`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.errors import AdapterError
from fedpeft.methods.targets import reads_images
from fedpeft.mixtures.gates import Gates, Term
from fedpeft.mixtures.plans import Share, blend_of, pairs_of_rows, pairs_of_weights
from fedpeft.mixtures.slabs import Slab, Store
from fedpeft.mixtures.soft import check_soft, kind_of
from fedpeft.mixtures.state import Routed

SPARSE = 0.5
"""Weights with at most this share of entries other than 0 are multiplied pair by pair."""


def check_gates(gates: Gates, model: nn.Module) -> None:
    """Raise `AdapterError` when ``gates`` are for tokens and ``model`` is an encoder-decoder, or reads images."""
    config: Any = getattr(model, "config", None)
    if reads_images(model) and any(term.kind == "tokens" for term in gates.terms):
        raise AdapterError(f"gates: {type(model).__name__} makes tokens of its own from images; give weights of rows")
    if getattr(config, "is_encoder_decoder", False) and any(term.kind == "tokens" for term in gates.terms):
        raise AdapterError(f"gates: {type(model).__name__} reads tokens in its encoder and others in its decoder; give weights of rows")


def compiled(gates: Gates, store: Store, shared: Share | None) -> tuple[tuple[Share, ...], tuple[Routed, ...]]:
    """The shares that are known now, and the terms that a router decides. Raises `AdapterError` when terms differ in rows."""
    rows = {_rows(term) for term in gates.terms if term.kind != "routed"}
    if len(rows) > 1:
        raise AdapterError(f"gates: terms are for {sorted(rows)} rows; all terms of a mixture must be for the same batch")
    fixed: list[Share] = [] if shared is None else [shared]
    routed: list[Routed] = []
    for term in gates.terms:
        if term.kind == "routed":
            routed.append(_routed(term, store))
        else:
            fixed += _chosen(term, store) if term.kind == "rows" else _weighed(term, store)
    for share in fixed:
        check_soft(share, len(rows) == 0 or share.plan.units in (1, *rows))
    return tuple(fixed), tuple(routed)


def everyone(store: Store, name: str) -> Share:
    """The share by which ``name`` acts on whatever there is."""
    slab, row = store.place[name]
    found = pairs_of_weights(torch.ones(1, 1, device=slab.values.device), [row], slab.capacity)
    assert found is not None
    return Share(slab, found)


def heads_of(gates: Gates) -> tuple[str | None, ...] | None:
    """Each row's own adapter, or the one with the largest weight; None where the gates do not say."""
    for kind in ("rows", "weights"):
        for term in gates.terms:
            if term.kind == kind:
                return term.picks if kind == "rows" else tuple(term.names[i] for i in term.values.argmax(1).tolist())
    return None


def _rows(term: Term) -> int:
    return len(term.picks) if term.kind == "rows" else len(term.values)


def _chosen(term: Term, store: Store) -> list[Share]:
    found = []
    for slab, places in store.rows(term.names).values():
        row = dict(places)
        picked = [row.get(name, -1) if name is not None else -1 for name in term.picks]
        found.append(Share(slab, pairs_of_rows(picked, slab.capacity, slab.values.device)))
    return found


def _weighed(term: Term, store: Store) -> list[Share]:
    values: Tensor = term.values
    found, column = [], {name: i for i, name in enumerate(term.names)}
    for slab, places in store.rows(term.names).values():
        part = values[..., [column[name] for name, _ in places]].flatten(0, -2).to(slab.values.device)
        share = _share(slab, part, [row for _, row in places])
        found += [share] if share is not None else []
    return found


def _share(slab: Slab, weights: Tensor, slots: list[int]) -> Share | None:
    if weights.requires_grad or float((weights != 0).float().mean()) > SPARSE:
        return Share(slab, blend_of(weights, slots, slab.capacity))
    pairs = pairs_of_weights(weights, slots, slab.capacity)
    return None if pairs is None else Share(slab, pairs)


def _routed(term: Term, store: Store) -> Routed:
    column = {name: i for i, name in enumerate(term.names)}
    slabs = store.rows(term.names).values()
    soft = {kind_of(slab) for slab, _ in slabs} - {None}
    if soft:
        raise AdapterError(f"gates: a {soft.pop()} acts on whole rows, which no layer's router can choose; name its adapter in Gates.rows")
    return Routed(term, tuple((slab, tuple((column[name], row) for name, row in places)) for slab, places in slabs))
