"""Vectors to mask, and their plain sum."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings

STEPS = ("bundle", "deal", "mask", "agree", "reveal")
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def vectors_of(play, size=257, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-(2**31), 2**31, size, np.int64).astype(np.int32) for name in play.members}


def plain(vectors, names):
    total = np.zeros(len(next(iter(vectors.values()))), np.uint32)
    for name in names:
        total += vectors[name].view(np.uint32)
    return total.view(np.int32)
