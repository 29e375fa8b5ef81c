"""What the table of tuners says of each: peft's type, its settings under our names, the roles of its tensors, its facts; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.methods import values
from fedpeft.methods.spec import MethodSpec
from fedpeft.tensors import Entry

Place = Literal["linear", "norms", "embeddings", "attention", "blocks", "tokens", "cache"]
"""What a tuner is put on: chosen linear layers, norms, the input embedding, whole attentions, whole blocks, the input, the cache."""

FROZEN = "frozen"
"""The role, in a row alone, of what peft marks as trained although no gradient ever moves it."""


@dataclass(frozen=True)
class Setting:
    """One key of the method's TOML table: its type with bounds, its default, and what peft's config calls it.

    A ``name`` with commas sets several of peft's alike.
    """

    type: Any
    default: Any
    name: str


@dataclass(frozen=True)
class Start:
    """How round-0 values of a role are drawn from a numpy generator; ``size`` is a value, a bound, a deviation or an axis."""

    how: Literal["constant", "uniform", "normal", "fan-in"]
    size: float = 0.0

    def draw(self, entry: Entry, rng: np.random.Generator) -> NDArray[np.float32]:
        """Values of the shape of ``entry``."""
        if self.how == "constant":
            return np.full(entry.shape, self.size, np.float32)
        if self.how == "fan-in":
            bound = 1.0 / sqrt(entry.shape[int(self.size)])
            return rng.uniform(-bound, bound, entry.shape).astype(np.float32)
        if self.how == "uniform":
            return rng.uniform(-self.size, self.size, entry.shape).astype(np.float32)
        return values.normal(entry, rng, self.size)


ZERO, ONE, FAN_IN = Start("constant"), Start("constant", 1.0), Start("fan-in", -1)


@dataclass(frozen=True)
class Row:
    """One tuner of peft.

    ``roles``: dotted part of a tensor's name -> role, the first that is found. ``fixed``: arguments of peft's config that are no
    setting here. ``start``: role -> how it is drawn; a role that is not there starts at what peft makes of the base. ``targets``:
    the default of that setting, for tuners of linear layers. ``portable``: stock peft loads what we save. ``in_place``: its
    forward writes into what the layer below answers. ``reads``: its forward multiplies a dense layer's weight itself. ``measures``:
    peft lays its tensors out with the base's weights at hand.
    """

    peft: str
    spec: MethodSpec
    roles: Mapping[str, str]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, Start] = field(default_factory=dict)
    place: Place = "linear"
    targets: tuple[str, ...] = ("attention",)
    portable: bool = True
    in_place: bool = False
    reads: bool = False
    measures: bool = False

    def role(self, name: str) -> tuple[str, str]:
        """(role, module) of the tensor ``name``. Raises `KeyError` where the table names none of its parts."""
        dotted = f".{name}."
        for part, role in self.roles.items():
            place = dotted.rfind(f".{part}.")
            if place >= 0:
                return role, dotted[1:place]
        raise KeyError(name)


def whole(default: int, name: str, least: int = 1) -> Setting:
    """A whole number of at least ``least``."""
    return Setting(Annotated[int, Field(ge=least)], default, name)


def real(default: float, name: str) -> Setting:
    """A positive number."""
    return Setting(Annotated[float, Field(gt=0)], default, name)


def share(default: float, name: str) -> Setting:
    """A number in [0, 1)."""
    return Setting(Annotated[float, Field(ge=0, lt=1)], default, name)


def flag(default: bool, name: str) -> Setting:
    """A switch."""
    return Setting(bool, default, name)


def choice(options: Any, default: str, name: str) -> Setting:
    """One of the words of the `Literal` ``options``."""
    return Setting(options, default, name)


def ids(default: tuple[int, ...], name: str) -> Setting:
    """Token ids, at least one."""
    return Setting(Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)], default, name)


RANK = whole(8, "r")
"""The commonest setting."""
