"""Which tasks' adapters point the same way: cosines of products, and clusters of them (FedLEASE, arXiv 2509.15087, in product space)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedpeft.errors import AdapterError
from fedpeft.factors import Matrix, gram, pairs
from fedpeft.tensors import Tensors

LEAST_SILHOUETTE = 0.1
"""Below it there is no structure worth a cut: all are one cluster."""


def cosines(adapters: Sequence[Tensors]) -> Matrix:
    """Cosines (T, T) between adapters of one base, over all modules together and up to no gauge; 0 for an adapter whose product is zero.

    Raises:
        AdapterError: an adapter has no factors, or they act on different modules.
    """
    named = [tensors.named() for tensors in adapters]
    modules = [pairs(tensors.layout) for tensors in adapters]
    if not modules or not modules[0] or any(found != modules[0] for found in modules):
        raise AdapterError(
            "clusters: the adapters need low-rank factors on the same modules; compare LoRA adapters of one base and targets"
        )
    table = sum((gram([(one[pair.b], one[pair.a]) for one in named]) for pair in modules[0]), np.float64(0.0))
    sizes = np.sqrt(np.maximum(np.diagonal(table), 0.0))
    scale = np.outer(sizes, sizes)
    found: Matrix = np.divide(table, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.clip(found, -1.0, 1.0)


def clusters(similar: Matrix, least: float = LEAST_SILHOUETTE) -> tuple[int, ...]:
    """A label for each of T tasks, counted from 0 in order of first appearance, from their ``similar`` (T, T) cosines.

    Average linkage on 1 - cosine; the number of clusters is the one of largest silhouette, or 1 where none reaches ``least``.
    """
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    far = np.maximum(1.0 - similar, 0.0)
    np.fill_diagonal(far, 0.0)
    best, labels = least, np.zeros(len(far), int)
    for count in range(2, len(far)):
        found = AgglomerativeClustering(count, metric="precomputed", linkage="average").fit_predict(far)
        score = float(silhouette_score(far, found, metric="precomputed"))
        if score > best:
            best, labels = score, found
    order = list(dict.fromkeys(labels.tolist()))
    return tuple(order.index(label) for label in labels.tolist())
