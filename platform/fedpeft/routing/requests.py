"""What is routed, and where it goes: a `Request`, a `Route`, and the one form of all routers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError

Values = NDArray[np.float32]
States = Mapping[str, Values]
"""Inputs (N, n) of a module for the request's N tokens, by the module's name in the base."""


@dataclass(frozen=True)
class Request:
    """One request: the caller's ``task`` if it names one, and how to get the rest, which is computed only for routers that look at it.

    ``embed`` gives the text's embedding (D,) by ``encoder`` (as in `Card.encoder`; empty is not checked), ``watch`` the inputs of the
    base's modules. ``text`` is the request itself, where whoever routes may read it.
    """

    task: str | None = None
    embed: Callable[[], NDArray[np.floating[Any]]] | None = None
    watch: Callable[[], States] | None = None
    encoder: str = ""
    text: str | None = None

    @staticmethod
    def of(vector: NDArray[np.floating[Any]], encoder: str = "", text: str | None = None) -> Request:
        """A request known by its embedding (D,) alone, or as a text too."""
        return Request(embed=lambda: vector, encoder=encoder, text=text)

    @cached_property
    def vector(self) -> NDArray[np.floating[Any]]:
        """The embedding (D,). Raises `AdapterError` when the request has none."""
        if self.embed is None:
            raise AdapterError("router: this request has no embedding, which centroids need; name a task or give a text")
        return np.asarray(self.embed())

    @cached_property
    def states(self) -> States:
        """The inputs of the base's modules. Raises `AdapterError` when the request has none."""
        if self.watch is None:
            raise AdapterError("router: this request has no hidden states, which gate, arrow and spectr read; use centroid or name a task")
        return self.watch()


@dataclass(frozen=True)
class Route:
    """Where a request goes.

    Attributes:
        weights: adapter -> its share of the answer; empty is the base alone.
        score: the best of ``scores``, or the chosen one's.
        scores: what every adapter got, in the router's own measure.
        router: the kind that decided; ``why`` says so for a person.
        level: ``token`` when every token and module weighs the adapters anew, and ``weights`` are the means over them.
    """

    weights: Mapping[str, float]
    score: float
    scores: Mapping[str, float] = field(default_factory=dict)
    router: str = ""
    why: str = ""
    level: Literal["sequence", "token"] = "sequence"

    @property
    def task(self) -> str | None:
        """The adapter of most weight, among equals that of the best score; None is the base alone."""
        rank = {name: (weight, self.scores.get(name, 0.0)) for name, weight in sorted(self.weights.items())}
        return max(rank, key=lambda name: rank[name]) if rank else None

    def after(self, why: str) -> Route:
        """This route, reached for what ``why`` says first."""
        return replace(self, why="; ".join(filter(None, (why, self.why))))


class Router(Protocol):
    """Request -> Route; a route without weights abstains, and the base answers unless another router is asked."""

    kind: ClassVar[str]

    def route(self, request: Request) -> Route:
        """Raises `AdapterError` when the request lacks what this router looks at."""
        ...
