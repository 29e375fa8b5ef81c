"""What ranks left behind: losses of each step, values of checkpoints, and how near two of them are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedpeft.central.engine import WAYS
from fedpeft.training import checkpoint


def losses(result: dict, key: str = "all") -> np.ndarray:
    assert "losses" in result, result
    return np.array([step[key] for step in result["losses"]])


def values(folder: Path, name: str) -> dict[str, np.ndarray]:
    held = checkpoint.read(folder / name / "checkpoint")
    assert held is not None
    return {key: array for key, array in held.arrays.items() if key != WAYS}


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float) -> None:
    """As vectors: Adam moves by a whole step what has no gradient but rounding."""
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert float(np.linalg.norm(array - other[name])) <= tolerance * float(np.linalg.norm(other[name])), name


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert all((array == other[name]).all() for name, array in one.items())
