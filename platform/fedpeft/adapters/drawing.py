"""Round-0 values that a method draws from a seed, and what of the base's config it reads for that; no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.spec import AdapterSpec, entry_seed
from fedpeft.tensors import Entry


def draw(spec: AdapterSpec, seed: int, config: Any) -> dict[Entry, NDArray[np.float32] | None]:
    """What ``spec``'s method draws for each tensor, given the base's ``config``; None where only the base's weights say."""
    return {entry: _values(spec, entry, seed, config) for entry in spec.layout.entries}


def _values(spec: AdapterSpec, entry: Entry, seed: int, config: Any) -> NDArray[np.float32] | None:
    values = spec.method.initial(entry, np.random.default_rng(entry_seed(seed, entry.name)), config)
    return None if values is None else np.asarray(values, np.float32)


@dataclass
class Noted:
    """Stands for ``config`` and keeps in ``read`` what is asked of it: a namespace of these draws the same values."""

    config: Any
    read: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        self.read[name] = getattr(self.config, name)
        return self.read[name]


def needed(spec: AdapterSpec, config: Any) -> dict[str, Any] | None:
    """The settings of ``config`` that drawing round 0 reads; None where these are no plain values, or weights are read too."""
    noted = Noted(config)
    if spec.method.needs_weights or any(values is None for values in draw(spec, 0, noted).values()):
        return None
    try:
        plain = json.loads(json.dumps(noted.read))
    except (TypeError, ValueError):
        return None
    return noted.read if plain == noted.read else None
