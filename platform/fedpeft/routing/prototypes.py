"""Routing from weights alone: Arrow's and SpectR's prototypes of an adapter, PHATGOOSE's gate, and the mixture that they weigh.

All of it is done in rank space: no (out, in) matrix is formed, and the mixture is one product over all experts' stacked ranks.
Shape legend: N rows, E experts, n inputs, m outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError
from fedpeft.factors import Factor, Product

Values = NDArray[np.float32]
EPSILON = 1e-12
"""What lengths and deviations are taken to be at least."""


def arrow(product: tuple[Factor, Factor]) -> Values:
    """The direction (n,) that ``B A`` stretches most: its first right singular vector, of unit length.

    A property of the product alone, so any gauge ``(B R^-1, R A)`` gives the same; the sign, which routing ignores, is fixed by
    the entry of largest size (Arrow, Ostapenko et al. 2024, arXiv 2405.11157). Raises `AdapterError` when the product is zero.
    """
    vector = spectrum(product)[0]
    length = float(np.linalg.norm(vector))
    if length == 0.0:
        raise AdapterError("arrow: the adapter's product is zero, so it stretches no direction; route after its first round")
    unit: Values = vector / np.float32(length * np.sign(vector[np.argmax(np.abs(vector))]))
    return unit


def spectrum(product: tuple[Factor, Factor]) -> Values:
    """``S V'`` (r, n) of ``B A = U S V'`` (SpectR, arXiv 2504.03454)."""
    b, a = (np.asarray(factor, np.float64) for factor in product)
    q, right = np.linalg.qr(a.T)
    _, sizes, vectors = np.linalg.svd(np.linalg.qr(b, mode="r") @ right.T)
    rows: Values = (sizes[:, None] * (vectors[: len(sizes)] @ q.T)).astype(np.float32)
    return rows


def arrow_scores(prototypes: Values, x: Values) -> Values:
    """``|v_e . x|``: prototypes (E, n), x (N, n) -> (N, E)."""
    scores: Values = np.abs(x @ prototypes.T)
    return scores


def spectrum_scores(spectra: Sequence[Values], x: Values) -> Values:
    """``||S V' x||`` for each expert: x (N, n) -> (N, E)."""
    return np.stack([np.linalg.norm(x @ rows.T, axis=1) for rows in spectra], axis=1)


def gate_scores(gates: Values, x: Values) -> Values:
    """PHATGOOSE's logits (Muqeeth et al. 2024, arXiv 2402.05859): gates (E, n), x (N, n), both standardised -> (N, E).

    Standardising makes them independent of the scale of a gate, so no expert wins by being loud.
    """
    return _standard(x) @ _standard(gates).T / np.float32(np.sqrt(gates.shape[1]))


def largest(scores: Values, k: int) -> NDArray[np.intp]:
    """Places (N, k) of each row's ``k`` largest scores (N, E), in no order."""
    return np.argpartition(scores, -k, axis=1)[:, -k:]


def top(scores: Values, k: int) -> Values:
    """Softmax over each row's ``k`` largest scores, 0 elsewhere: (N, E) -> (N, E)."""
    kept = largest(scores, k)
    chosen = np.take_along_axis(scores, kept, axis=1)
    shares = np.exp(chosen - chosen.max(axis=1, keepdims=True))
    weights = np.zeros_like(scores)
    np.put_along_axis(weights, kept, (shares / shares.sum(axis=1, keepdims=True)).astype(scores.dtype), axis=1)
    return weights


def mix(experts: Sequence[Product], weights: Values, x: Values) -> Values:
    """``sum_e w_e(x) B_e A_e x`` with one weight per row and expert: weights (N, E), x (N, n) -> (N, m).

    The weights scale the stacked rank activations (N, R), so the experts' outputs (N, E, m) never exist.
    """
    ranks = [expert.a.shape[0] for expert in experts]
    inner = x @ np.concatenate([expert.a for expert in experts]).T
    mixed: Values = (inner * np.repeat(weights, ranks, axis=1)) @ np.concatenate([expert.b for expert in experts], axis=1).T
    return mixed


def _standard(rows: Values) -> Values:
    centred = rows - rows.mean(axis=1, keepdims=True)
    standard: Values = centred / np.maximum(centred.std(axis=1, keepdims=True), np.float32(EPSILON))
    return standard
