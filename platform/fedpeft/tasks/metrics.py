"""Metrics from counters. A counter is a sum over examples and nothing else, so sites' counters add up to those of their union.

Counters: ``loss`` (nats) over ``count`` terms, ``examples``, ``correct``; ``tp``, ``fp``, ``fn`` per label; ``exact`` and ``rouge``
over ``generated``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import exp, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counters = Mapping[str, tuple[float, ...]]


def accuracy(counters: Counters) -> float:
    """Share of examples answered correctly."""
    return _ratio(counters, "correct", "examples")


def macro_f1(counters: Counters) -> float:
    """F1 per label, averaged over the labels that occur as truth or as prediction (scikit-learn's default)."""
    tp, fp, fn = (np.asarray(counters.get(name, ()), np.float64) for name in ("tp", "fp", "fn"))
    seen = 2 * tp + fp + fn
    return float((2 * tp[seen > 0] / seen[seen > 0]).mean()) if (seen > 0).any() else nan


def exact_match(counters: Counters) -> float:
    """Share of generated texts equal to the reference, spaces at the ends and between words aside."""
    return _ratio(counters, "exact", "generated")


def rouge_l(counters: Counters) -> float:
    """Mean ROUGE-L F-measure (Lin 2004) of generated texts, as ``rouge_score`` computes it without a stemmer."""
    return _ratio(counters, "rouge", "generated")


def perplexity(counters: Counters) -> float:
    """Exponential of the mean loss per labelled token; lower is better."""
    return exp(min(_ratio(counters, "loss", "count"), 700.0))


METRICS: dict[str, Callable[[Counters], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "perplexity": perplexity,
}


LESS = frozenset({"perplexity"})
"""Metrics of which less is better."""


def upward(metric: str, value: float) -> float:
    """``value``, negated where less of ``metric`` is better."""
    return -value if metric in LESS else value


def scores(counters: Counters, metrics: Sequence[str]) -> dict[str, float]:
    """The named metrics; NaN where nothing was counted."""
    return {name: METRICS[name](counters) for name in metrics}


def check_metrics(metrics: Sequence[str], allowed: Sequence[str], kind: str) -> None:
    """Raise `ValueError` when a task asks for no metric, or for one that it has no counters for."""
    unknown = sorted(set(metrics) - set(allowed))
    if unknown or not metrics:
        raise ValueError(f"{kind}: metrics {unknown or list(metrics)} cannot be computed; choose from {list(allowed)}")


def confusion(truth: NDArray[Any], predicted: NDArray[Any], labels: int) -> Counters:
    """``examples``, ``correct`` and per label ``tp``, ``fp``, ``fn`` of class indices (N,)."""
    tp, said, true = (np.bincount(values, minlength=labels) for values in (truth[truth == predicted], predicted, truth))
    return {
        "examples": (float(len(truth)),),
        "correct": (float(tp.sum()),),
        "tp": _floats(tp),
        "fp": _floats(said - tp),
        "fn": _floats(true - tp),
    }


def text_counters(generated: Sequence[str], references: Sequence[str]) -> Counters:
    """``exact``, ``rouge`` and ``generated`` of texts against their references."""
    pairs = list(zip(generated, references, strict=True))
    exact = sum(said.split() == wanted.split() for said, wanted in pairs)
    rouge = sum(_scorer().score(wanted, said)["rougeL"].fmeasure for said, wanted in pairs)
    return {"exact": (float(exact),), "rouge": (float(rouge),), "generated": (float(len(pairs)),)}


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def _ratio(counters: Counters, above: str, below: str) -> float:
    total = counters.get(below, (0.0,))[0]
    return counters.get(above, (0.0,))[0] / total if total else nan


def _floats(values: NDArray[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
