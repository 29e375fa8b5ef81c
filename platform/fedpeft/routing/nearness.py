"""How near a text is to a site's own rows: the weight of its private adapter for that text (FedDPA, Yang et al. 2024, arXiv 2403.19211).

Vectors are embeddings of length 1; the site's never leave it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError

Vectors = NDArray[np.float32]
LEAST = 1e-3
"""Rows that are as good as unrelated to each other are no measure of nearness."""


@dataclass(frozen=True, eq=False)
class Nearness:
    """``lambda_x = scale * mean over the rows of cos(x, row)``, from 0 to 1, as in the paper's equation 5 (instance-wise weight).

    ``rows`` (S, D) are the embeddings of a few of the site's rows. Without a ``scale`` it is one over the mean cosine that the rows
    have to each other: a text that is as near to them as they are gets 1, the weight that the pair was trained with.
    """

    rows: Vectors
    scale: float | None = None

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise AdapterError("nearness: no row of the site is given; a private adapter is weighed by how near a text is to some")

    def weight(self, vector: Vectors) -> float:
        """The weight for a text's embedding (D,)."""
        factor = 1.0 / self.among if self.scale is None else self.scale
        return float(np.clip(factor * float((self.rows @ vector).mean()), 0.0, 1.0))

    @property
    def among(self) -> float:
        """The mean cosine of two different rows; 1 where there is but one."""
        count = len(self.rows)
        if count == 1:
            return 1.0
        total = float(np.square(self.rows.sum(axis=0, dtype=np.float64)).sum() - np.square(self.rows, dtype=np.float64).sum())
        return max(total / (count * (count - 1)), LEAST)
