"""Router cards: a task as the mean direction of its texts, made of sums only, so that no text or embedding leaves a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedpeft.errors import AdapterError

LARGEST = 1 << 16
"""Most values of a centroid that is read from outside."""
BINS = 64
"""Equal bins over the cosines from -1 to 1."""
Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Card:
    """A unit-norm ``centroid`` (D values), the least cosine that counts as the task's, and how many texts made it.

    ``encoder`` says what embedded them, as ``model@identity``: cosines between two encoders' vectors mean nothing. ``counts`` are the
    texts' cosines to the centroid in `BINS` bins, from which any other threshold follows. Both are empty in cards of old.
    """

    centroid: tuple[float, ...]
    threshold: float
    count: int
    encoder: str = ""
    counts: tuple[float, ...] = ()

    @property
    def vector(self) -> Vector:
        """The centroid as float32 (D,)."""
        return np.asarray(self.centroid, np.float32)

    def loosened(self, quantile: float) -> float:
        """The cosine that all but a share ``quantile`` of the texts reach; the threshold where the card has no counts."""
        return calibrate(self.counts, quantile) if self.counts else self.threshold

    def to_json(self) -> dict[str, Any]:
        """A JSON form that `from_json` reads back, bit for bit."""
        known = {"centroid": list(self.centroid), "threshold": self.threshold, "count": self.count}
        return known | ({"encoder": self.encoder} if self.encoder else {}) | ({"counts": list(self.counts)} if self.counts else {})

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Card:
        """Inverse of `to_json`. Raises `AdapterError` when a field is missing or is not what it should be."""
        try:
            card = Card(
                tuple(map(float, row["centroid"])),
                float(row["threshold"]),
                int(row["count"]),
                str(row.get("encoder", "")),
                tuple(map(float, row.get("counts", ()))),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as fault:
            raise AdapterError(f"router card: {fault!r}; it needs centroid (numbers), threshold and count") from None
        card.check()
        return card

    def check(self) -> None:
        """Raise `AdapterError` when a value is not finite, or sizes are not what they should be."""
        if not (0 < len(self.centroid) <= LARGEST and np.isfinite([*self.centroid, self.threshold]).all() and self.count >= 0):
            raise AdapterError(
                f"router card: {len(self.centroid)} values, threshold {self.threshold}, count {self.count}; it needs 1 to {LARGEST} "
                "finite values and a count of at least 0"
            )
        if self.counts:
            calibrate(self.counts)


def common_encoder(cards: Mapping[str, Card], asked: str = "") -> str:
    """What embedded the texts of all ``cards``, and ``asked`` for; empty where no card says so.

    Raises:
        AdapterError: two of them differ.
    """
    known = {name: card.encoder for name, card in sorted(cards.items()) if card.encoder}
    if len({*known.values(), *filter(None, (asked,))}) > 1:
        raise AdapterError(
            f"router: the request is embedded by {asked or 'an unnamed encoder'}, the cards by {known}; make all cards with one encoder"
        )
    return next(iter(known.values()), asked)


def centroid(total: ArrayLike, count: float) -> Vector:
    """Direction of the mean of ``count`` embeddings whose sum is ``total`` (D,): float32 of norm 1.

    Raises:
        AdapterError: no embedding was summed, or they cancel.
    """
    values = np.asarray(total, np.float64)
    norm = float(np.linalg.norm(values))
    if count < 1 or not np.isfinite(norm) or norm == 0.0:
        raise AdapterError(f"router card: the sum of {count:.0f} embeddings has norm {norm}; a card needs texts that embed to something")
    return (values / norm).astype(np.float32)


def histogram(embeddings: NDArray[np.floating[Any]], direction: Vector) -> tuple[float, ...]:
    """Counts of the cosines of unit-norm ``embeddings`` (N, D) to ``direction`` (D,) in `BINS` bins: sums only, mergeable by adding."""
    return counts_of(embeddings @ direction)


def counts_of(cosines: NDArray[np.floating[Any]]) -> tuple[float, ...]:
    """Counts of ``cosines`` (N,) in `BINS` bins."""
    counts, _ = np.histogram(np.clip(cosines, -1.0, 1.0), BINS, (-1.0, 1.0))
    return tuple(counts.astype(float).tolist())


def calibrate(counts: Sequence[float], quantile: float = 0.05) -> float:
    """The cosine below which a share ``quantile`` of the counted texts lie, linear inside its bin; -1 when nothing was counted.

    Raises:
        AdapterError: not `BINS` counts, a negative one, or a quantile outside [0, 1].
    """
    if len(counts) != BINS or not all(0.0 <= count < np.inf for count in counts) or not 0.0 <= quantile <= 1.0:
        raise AdapterError(f"router card: {len(counts)} counts at quantile {quantile}; needs {BINS} counts >= 0 and a quantile in [0, 1]")
    wanted, width, below = quantile * sum(counts), 2.0 / BINS, 0.0
    for place, (inside, upto) in enumerate(zip(counts, accumulate(counts), strict=True)):
        if inside and upto >= wanted:
            return -1.0 + width * (place + (wanted - below) / inside)
        below = upto
    return -1.0


def make_card(total: ArrayLike, count: float, counts: Sequence[float], quantile: float = 0.05, encoder: str = "") -> Card:
    """A card from the sum of ``count`` embeddings by ``encoder`` and the histogram of their cosines to its `centroid`."""
    return Card(tuple(centroid(total, count).tolist()), calibrate(counts, quantile), int(count), encoder, tuple(map(float, counts)))
