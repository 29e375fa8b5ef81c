"""How likely a request is under each task, and how near it is to each for one of no task: by its embedding, and by its spelling too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedpeft.routing.gaussians import gaussians
from fedpeft.routing.moments import Exact, Measure, Rows
from fedpeft.routing.ngrams import spellings

CLOSENESS, TEXTED = "closeness", "closeness.text"
"""Counters of histograms of own texts' closeness: by embedding alone, and by spelling too."""


def read(measures: tuple[Measure, ...], embeddings: Rows, texts: Sequence[str] | None = None) -> tuple[Exact, Exact]:
    """Log-likelihoods, up to a constant, and closenesses, both (N, E), of texts known by ``embeddings`` (N, D), and as ``texts``.

    Likelihoods multiply, as if spelling told nothing of the embedding. To the closeness of an embedding, a mean over its D values, comes
    the excess of n-grams over the root of D, so that both spread own texts alike; the sum is kept within [-1, 1].

    Raises:
        AdapterError: embeddings of another width, or texts for tasks whose n-grams were not counted.
    """
    likely, close = gaussians(measures).read(embeddings)
    if texts is None:
        return likely, close
    more, excess = spellings(measures).read(texts)
    return likely + more, np.clip(close + excess / np.sqrt(measures[0].own.width), -1.0, 1.0)
