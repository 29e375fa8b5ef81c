"""What share of the examples each task gives when several tasks train together: plain rules over task sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

from pydantic import Field

Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Mixing(Protocol):
    """A rule from task sizes to shares."""

    kind: ClassVar[str]

    def shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Shares of the tasks of ``sizes`` (examples per task); they sum to 1."""


@dataclass(frozen=True)
class Proportional:
    """Each example equally often."""

    kind: ClassVar[str] = "proportional"

    def shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """``n_t / sum n``."""
        return _normalise({task: float(size) for task, size in sizes.items()})


@dataclass(frozen=True)
class Temperature:
    """Between proportional (temperature 1) and equal (large), as in Raffel et al. 2020 (arXiv 1910.10683, section 3.5.2)."""

    temperature: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 2.0
    kind: ClassVar[str] = "temperature"

    def shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """``n_t^(1/T) / sum n^(1/T)``."""
        return _normalise({task: size ** (1.0 / self.temperature) for task, size in sizes.items()})


@dataclass(frozen=True)
class Equal:
    """Each task equally often."""

    kind: ClassVar[str] = "equal"

    def shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """``1 / T`` for each task that has examples."""
        return _normalise({task: float(size > 0) for task, size in sizes.items()})


@dataclass(frozen=True)
class Explicit:
    """Shares as given, normalised."""

    weights: Mapping[str, Weight]
    kind: ClassVar[str] = "explicit"

    def shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """``w_t / sum w`` over the tasks of ``sizes``."""
        return _normalise({task: self.weights[task] for task in sizes})


MIXINGS: dict[str, type[Mixing]] = {"proportional": Proportional, "temperature": Temperature, "equal": Equal, "explicit": Explicit}


def _normalise(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {task: weight / total if total else 0.0 for task, weight in weights.items()}
