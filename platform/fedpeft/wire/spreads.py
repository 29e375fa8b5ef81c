"""Moments of embeddings on the wire."""

from __future__ import annotations

import numpy as np

from fedpeft.errors import AdapterError, UpdateError
from fedpeft.routing.moments import Moments, packed, unpacked
from fedpeft.wire.v1 import federation_pb2 as pb

FLOAT = np.dtype("<f4")


def spread_message(known: Moments) -> pb.Spread:
    """``known`` as it travels: to float32's precision."""
    return pb.Spread(count=known.count, mean=known.mean.astype(FLOAT).tobytes(), triangle=packed(known.covariance).astype(FLOAT).tobytes())


def spread_of(message: pb.Spread) -> Moments:
    """Inverse of `spread_message`. Raises `UpdateError` when it can be none."""
    try:
        mean, triangle = (np.frombuffer(data, FLOAT).astype(np.float64) for data in (message.mean, message.triangle))
        covariance = unpacked(triangle)
    except (ValueError, AdapterError) as fault:
        raise UpdateError(f"plan: moments cannot be read: {fault}; do both sides run one version?") from None
    if len(mean) != len(covariance) or not (message.count >= 1.0 and np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UpdateError(
            f"plan: moments of {message.count:g} texts, a mean of {len(mean)} values, a covariance of {len(covariance)}; they must be "
            "finite and of one width"
        )
    return Moments(message.count, mean, covariance)
