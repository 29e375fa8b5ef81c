"""Routers made from the router cards of what is served, by name: what a service, a site and a benchmark ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from fedpeft.errors import AdapterError
from fedpeft.routing.cardfile import RouterCard
from fedpeft.routing.cards import Card, calibrate
from fedpeft.routing.chain import Calibrated, Chain, Within
from fedpeft.routing.closeness import TEXTED
from fedpeft.routing.learned import XLoraRouter
from fedpeft.routing.requests import Router
from fedpeft.routing.routers import CentroidRouter, ClusterRouter, MahalanobisRouter, MeanRouter, TaskRouter
from fedpeft.routing.tokens import ArrowRouter, GateRouter, Prototypes, SpectrRouter, TokenRouter

Cards = Mapping[str, RouterCard]
"""Router cards by adapter."""
FIRST, NEAR = ("task", "centroid"), ("gate", "arrow", "cluster")
"""Who is asked before whom in a chain (ALGORITHMS B2); the latter only for requests near some task."""
NEEDS = {
    **dict.fromkeys(("centroid", "centroid3", "cluster"), "a centroid: its sites sent no embeddings"),
    "mahalanobis": "second moments: set routing.moments = true in the federation",
    "gate": "gates: set routing.gates = true in the federation",
    "arrow": "a direction: it is no LoRA adapter, or it did not train yet",
    "spectr": "a spectrum: it is no LoRA adapter, or it did not train yet",
    "xlora": "a trained router over adapters that are all served: train method.kind = 'xlora' with experts named as their tasks",
}


def make_router(kind: str, cards: Cards) -> Router:
    """The router ``kind`` over the adapters of ``cards``; ``chain`` asks all that can abstain, then the base answers.

    Where every card has second moments, what their router sends away is out of scope, and a chain asks nobody after it.
    Gate and Arrow abstain below the scores of training texts where the cards tell them; a chain leaves them out where they do not, since
    they would never abstain.

    Raises:
        AdapterError: no such router, or none of the adapters has what it needs.
    """
    if kind == "chain":
        if by_embedding(cards) == MahalanobisRouter.kind:
            return Chain((_task(cards), make_router(MahalanobisRouter.kind, cards)))
        known, near = _centroids(cards), Chain(_of_chain(NEAR, cards))
        return Chain((*_of_chain(FIRST, cards), *((Within(near, known),) if known and near.routers else ())))
    if kind not in MAKERS:
        raise AdapterError(f"router {kind!r} is not known; choose one of {sorted([*MAKERS, 'chain'])}")
    made = MAKERS[kind](cards)
    if made is None:
        raise AdapterError(f"router {kind}: none of {sorted(cards)} has {NEEDS[kind]}")
    return made


def by_embedding(cards: Cards) -> str:
    """The router for requests known by their embedding: by second moments where all cards have them, else by centroid."""
    known = bool(cards) and all(card.moments is not None and MahalanobisRouter.kind in card.counts for card in cards.values())
    return MahalanobisRouter.kind if known else CentroidRouter.kind


def token_router(kind: str, cards: Cards) -> TokenRouter:
    """The router over tokens, ``gate``, ``arrow`` or ``spectr``, that a route at the level of tokens names. Raises `AdapterError`."""
    made = make_router(kind, cards)
    inner = made.router if isinstance(made, Calibrated) else made
    if not isinstance(inner, GateRouter | ArrowRouter | SpectrRouter):
        raise AdapterError(f"router {kind}: weighs whole requests; choose gate, arrow or spectr")
    return inner


def _of_chain(kinds: Sequence[str], cards: Cards) -> tuple[Router, ...]:
    """Those of ``kinds`` that can abstain."""
    trained = {name for name, card in cards.items() if card.arrows or card.gates}
    made = [maker for kind in kinds if (maker := MAKERS[kind](cards)) is not None]
    return tuple(router for router in made if not isinstance(router, Calibrated) or set(router.least) >= trained)


def _centroids(cards: Cards) -> dict[str, Card]:
    return {name: card.card for name, card in cards.items() if card.card is not None}


def _task(cards: Cards) -> Router:
    return TaskRouter(tuple(sorted(cards)))


def _mean(cards: Cards) -> Router:
    return MeanRouter(tuple(sorted(cards)))


def _centroid(cards: Cards, top: int = 1) -> Router | None:
    known = _centroids(cards)
    return CentroidRouter(known, top) if known else None


def _mahalanobis(cards: Cards) -> Router | None:
    moments = {name: card.moments for name, card in cards.items() if card.moments is not None}
    counts, texted = (
        {name: cards[name].counts[kind] for name in moments if kind in cards[name].counts} for kind in (MahalanobisRouter.kind, TEXTED)
    )
    return MahalanobisRouter(_centroids({name: cards[name] for name in moments}), moments, counts, texted) if moments else None


def _cluster(cards: Cards) -> Router | None:
    known = _centroids(cards)
    return ClusterRouter(known) if known else None


def _gate(cards: Cards) -> Router | None:
    known: Prototypes = {name: card.gates for name, card in cards.items() if card.gates}
    return Calibrated(GateRouter(known), _least("gate", cards)) if known else None


def _arrow(cards: Cards) -> Router | None:
    known: Prototypes = {name: card.arrows for name, card in cards.items() if card.arrows}
    return Calibrated(ArrowRouter(known), _least("arrow", cards)) if known else None


def _spectr(cards: Cards) -> Router | None:
    known: Prototypes = {name: card.spectra for name, card in cards.items() if card.spectra}
    return SpectrRouter(known) if known else None


def _xlora(cards: Cards) -> Router | None:
    """The first, by its task's name, whose experts are all served."""
    known = [card.learned for _, card in sorted(cards.items()) if card.learned and set(card.learned.experts) <= set(cards)]
    return XLoraRouter(known[0]) if known else None


def _least(kind: str, cards: Cards, quantile: float = 0.05) -> dict[str, float]:
    return {name: calibrate(card.counts[kind], quantile) for name, card in cards.items() if kind in card.counts}


MAKERS: dict[str, Callable[[Cards], Router | None]] = {
    "task": _task,
    "centroid": _centroid,
    "centroid3": partial(_centroid, top=3),
    "mahalanobis": _mahalanobis,
    "gate": _gate,
    "arrow": _arrow,
    "spectr": _spectr,
    "xlora": _xlora,
    "cluster": _cluster,
    "mean": _mean,
}
