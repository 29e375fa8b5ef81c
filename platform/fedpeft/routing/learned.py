"""X-LoRA's trained router as a router over what is served (Buehler & Buehler 2024, arXiv 2402.07148).

A task trained by ``method.kind = "xlora"`` holds LoRA experts of other tasks and a router that reads the base's last hidden state. Its
router card holds that router, so requests can go to the experts as they are served now, mixed in one batch with all others.
Shape legend: N tokens, L layers, E experts, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedpeft.bases.spec import LAST
from fedpeft.errors import AdapterError
from fedpeft.routing.prototypes import Values
from fedpeft.routing.requests import Request, Route
from fedpeft.tensors import Tensors

WEIGHT, BIAS = "xlora.router.weight", "xlora.router.bias"


@dataclass(frozen=True, eq=False)
class Learned:
    """A trained router over ``experts`` by name: ``table`` (L E, H + 1) float32, layer by layer, the bias last."""

    experts: tuple[str, ...]
    table: Values

    def shares(self, states: Values) -> Values:
        """Of last hidden states (N, H) the means (N, E) over layers of softmax over experts. Raises `AdapterError` for another width."""
        weight, bias = self.table[:, :-1], self.table[:, -1]
        if states.shape[1] != weight.shape[1]:
            raise AdapterError(f"router xlora: reads {weight.shape[1]} hidden values, not {states.shape[1]}; it is of another base")
        logits = (states @ weight.T + bias).reshape(len(states), -1, len(self.experts))
        raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
        means: Values = (raised / raised.sum(axis=-1, keepdims=True)).mean(axis=1)
        return means


@dataclass(frozen=True, eq=False)
class XLoraRouter:
    """The means of X-LoRA's shares over a request's tokens and layers; an expert is the served adapter of its name.

    In X-LoRA's own forward every token and layer has shares of its own: their means are what one mixture for the request can keep.
    It never abstains.
    """

    learned: Learned
    kind: ClassVar[str] = "xlora"

    def route(self, request: Request) -> Route:
        """Raises `AdapterError` when the request has no hidden states, or those of another base."""
        states = request.states[LAST]
        weights = self.learned.shares(states).mean(axis=0, dtype=np.float64).tolist()
        table = dict(zip(self.learned.experts, weights, strict=True))
        return Route(table, max(weights), table, self.kind, f"mean shares of a trained router over {len(states)} tokens")


def learned_of(tensors: Tensors, experts: Sequence[str]) -> Learned:
    """The router of an X-LoRA adapter over ``experts``. Raises `AdapterError` when it is none."""
    found = {end: values for name, values in tensors.named().items() for end in (WEIGHT, BIAS) if name.endswith(end)}
    if len(found) != len((WEIGHT, BIAS)):
        raise AdapterError(f"router xlora: the adapter has no {WEIGHT} and {BIAS}; train it by method.kind = 'xlora'")
    return checked(tuple(experts), np.concatenate([found[WEIGHT], found[BIAS][:, None]], axis=1))


def checked(experts: tuple[str, ...], table: Values) -> Learned:
    """Raise `AdapterError` unless ``table`` is a router over ``experts``."""
    if not experts or len(set(experts)) != len(experts) or len(table) % len(experts) or table.shape[1] < 2:
        raise AdapterError(f"router xlora: a table {list(table.shape)} is no router over {len(experts)} experts of distinct names")
    return Learned(experts, table)
