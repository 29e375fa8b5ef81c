"""From guesses about membership to a lower bound on epsilon that holds with stated confidence (Steinke et al. 2023, arXiv 2305.08846).

Every candidate row was in the training set or not by its own fair coin. Under (epsilon, delta) differential privacy an attacker
who sees the outcome and guesses r of the m coins is right about v of them no more often than r coins of bias
e^epsilon / (1 + e^epsilon) are, but for delta; so many right guesses refute a small epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, lgamma, log1p

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import ConfigError

SHARES = (0.125, 0.25, 0.5, 1.0)
"""Shares of the candidates that are guessed about, the surest first; each is one test, and the confidence is split among them."""
LARGEST = 50.0


@dataclass(frozen=True)
class Finding:
    """What one attack found about ``candidates`` rows: the bound, the guesses it comes from, and how well scores tell members apart."""

    attack: str
    candidates: int
    guesses: int
    right: int
    epsilon: float
    auc: float
    advantage: float


def audit_scores(attack: str, scores: NDArray[np.float64], members: NDArray[np.bool_], delta: float, confidence: float) -> Finding:
    """The best bound of ``scores`` (m,), higher meaning "was trained on", against the coins ``members`` (m,).

    For each of `SHARES` the highest and the lowest scores are guessed to be in and out; choosing the best of them afterwards is paid
    for by splitting the error among them.

    Raises:
        ConfigError: ``confidence`` is not between 0 and 1, or ``delta`` not in [0, 1).
    """
    if not (0 < confidence < 1 and 0 <= delta < 1) or scores.shape != members.shape or len(scores) < 2:
        raise ConfigError(f"audit: confidence = {confidence} and delta = {delta} must lie between 0 and 1, on 2 rows or more")
    split = 1.0 - (1.0 - confidence) / len(SHARES)
    tried = [(guesses, _right(scores, members, guesses)) for guesses in sorted({2 * max(round(len(scores) * s / 2), 1) for s in SHARES})]
    bounds = [(epsilon_bound(len(scores), guesses, right, delta, split), guesses, right) for guesses, right in tried]
    epsilon, guesses, right = max(bounds)
    auc, advantage = _separation(scores, members)
    return Finding(attack, len(scores), guesses, right, epsilon, auc, advantage)


def epsilon_bound(candidates: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """The largest epsilon that ``right`` of ``guesses`` refute with ``confidence``; 0 when they refute none."""
    low, high = 0.0, LARGEST
    if p_value(candidates, guesses, right, low, delta) > 1.0 - confidence:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(candidates, guesses, right, middle, delta) <= 1.0 - confidence else (low, middle)
    return low


def p_value(candidates: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How probable ``right`` or more of ``guesses`` are, at most, under (epsilon, delta) privacy (theorem 5.2 there)."""
    mass = np.exp(_log_masses(guesses, epsilon))
    tail = float(mass[right:].sum())
    below = np.cumsum(mass[:right][::-1])
    slack = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(tail + 2.0 * candidates * delta * slack, 1.0)


def _log_masses(count: int, epsilon: float) -> NDArray[np.float64]:
    """Log probabilities of 0..count hits of a binomial whose chance is e^epsilon / (1 + e^epsilon)."""
    hit, miss = -log1p(exp(-epsilon)), -epsilon - log1p(exp(-epsilon))
    ways = [lgamma(count + 1) - lgamma(k + 1) - lgamma(count - k + 1) for k in range(count + 1)]
    hits = np.arange(count + 1)
    return np.asarray(np.array(ways) + hits * hit + (count - hits) * miss, np.float64)


def _right(scores: NDArray[np.float64], members: NDArray[np.bool_], guesses: int) -> int:
    """Right guesses when the highest half of ``guesses`` are said to be in and the lowest half out; ties keep the rows' order."""
    order, half = np.argsort(scores, kind="stable"), min(guesses, len(scores)) // 2
    return int(members[order[len(order) - half :]].sum() + (~members[order[:half]]).sum())


def _separation(scores: NDArray[np.float64], members: NDArray[np.bool_]) -> tuple[float, float]:
    """Area under the curve, and the largest difference of true and false positive rates (Yeom et al. 2018, arXiv 1709.01604)."""
    inside, outside = scores[members], scores[~members]
    if not (len(inside) and len(outside)):
        return 0.5, 0.0
    above = (inside[:, None] > outside).mean() + 0.5 * (inside[:, None] == outside).mean()
    cuts = np.unique(scores)
    gaps = (inside[:, None] >= cuts).mean(0) - (outside[:, None] >= cuts).mean(0)
    return float(above), float(max(gaps.max(), 0.0))


def logit(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(p / (1 - p)) of p = exp(-loss): nearly normal over training runs (Carlini et al. 2022, arXiv 2112.03570, section V)."""
    clipped = np.clip(losses, 1e-9, None)
    return np.asarray(-clipped - np.log(-np.expm1(-clipped)))


def likelihood_ratio(seen: NDArray[np.float64], shadows: NDArray[np.float64], inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Log likelihood ratio (m,) of ``seen`` (m,) under the shadows (k, m) that had the row and those that had not.

    One variance for all rows and both cases, as few shadows cannot give one for each (section VI.C there). Every row needs a shadow
    of both kinds.
    """
    means = [np.where(which, shadows, 0.0).sum(0) / which.sum(0) for which in (inside, ~inside)]
    spread = np.where(inside, shadows - means[0], shadows - means[1]).std() + 1e-6
    return np.asarray(((seen - means[1]) ** 2 - (seen - means[0]) ** 2) / (2 * spread**2))
