"""Moments of embeddings on the wire."""

from __future__ import annotations

import numpy as np

from fedpeft.errors import AdapterError, UpdateError
from fedpeft.routing.moments import BUCKETS, Moments, packed, unpacked
from fedpeft.wire.v1 import federation_pb2 as pb

FLOAT = np.dtype("<f4")


def spread_message(known: Moments) -> pb.Spread:
    """``known`` as it travels: to float32's precision."""
    arrays = {"mean": known.mean, "triangle": packed(known.covariance), "ngrams": known.ngrams}
    return pb.Spread(count=known.count, **{name: values.astype(FLOAT).tobytes() for name, values in arrays.items()})


def spread_of(message: pb.Spread) -> Moments:
    """Inverse of `spread_message`. Raises `UpdateError` when it can be none."""
    try:
        parts = (message.mean, message.triangle, message.ngrams)
        mean, triangle, ngrams = (np.frombuffer(data, FLOAT).astype(np.float64) for data in parts)
        covariance = unpacked(triangle)
    except (ValueError, AdapterError) as fault:
        raise UpdateError(f"plan: moments cannot be read: {fault}; do both sides run one version?") from None
    finite = message.count >= 1.0 and all(np.isfinite(part).all() for part in (mean, covariance, ngrams))
    if len(mean) != len(covariance) or len(ngrams) not in (0, BUCKETS) or not finite:
        raise UpdateError(
            f"plan: moments of {message.count:g} texts, a mean of {len(mean)} values, a covariance of {len(covariance)}, {len(ngrams)} "
            f"n-grams; they must be finite, of one width, and n-grams none or {BUCKETS}"
        )
    return Moments(message.count, mean, covariance, ngrams)
