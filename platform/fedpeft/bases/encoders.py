"""What embeds texts for routing: the base itself, a small encoder, or several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.bases.base import OWN, Base
from fedpeft.errors import BaseError

BESIDE = "+"
"""Between the names of encoders side by side."""


class Encoder(Protocol):
    """Texts to embeddings of length 1."""

    @property
    def encoder(self) -> str:
        """How router cards name it: ``model@identity``, several with `BESIDE` between them."""
        ...

    @property
    def width(self) -> int:
        """Values of an embedding."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings (N, D), each of length 1."""
        ...


@dataclass(frozen=True, eq=False)
class Bare:
    """The trunk of ``base`` whatever adapters it carries: the caller holds them off. ``model`` is what cards call it."""

    base: Base
    model: str = OWN

    @property
    def encoder(self) -> str:
        """As `Encoder` says."""
        return f"{self.model}@{self.base.fingerprint.identity}"

    @property
    def width(self) -> int:
        """As `Encoder` says."""
        return self.base.width

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As `Encoder` says."""
        from fedpeft.bases.embed import embed

        return embed(self.base, texts)


@dataclass(frozen=True, eq=False)
class Beside:
    """Embeddings of all ``parts`` one after the other, over the root of their number: cosines are the means of the parts' cosines."""

    parts: tuple[Encoder, ...]

    @property
    def encoder(self) -> str:
        """The parts' names."""
        return BESIDE.join(part.encoder for part in self.parts)

    @property
    def width(self) -> int:
        """The sum of the parts'."""
        return sum(part.width for part in self.parts)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As `Encoder` says."""
        found = np.concatenate([part.embed(texts) for part in self.parts], axis=1)
        return found * np.float32(len(self.parts) ** -0.5)


def make_encoder(models: Sequence[str], own: Encoder, load: Callable[[str], Base]) -> Encoder:
    """The encoders ``models`` side by side; `OWN` is ``own``, anything else what ``load`` gets. Raises `BaseError` as it does."""
    parts = tuple(own if model == OWN else Bare(load(model), model) for model in models)
    return parts[0] if len(parts) == 1 else Beside(parts)


def named_encoder(named: str, own: Encoder, load: Callable[[str], Base]) -> Encoder:
    """The encoder that router cards call ``named``; ``own`` where they say nothing.

    Raises:
        BaseError: that encoder cannot be found, or is another one here.
    """
    if not named:
        return own
    found = make_encoder(models_of(named), own, load)
    for wanted, here in zip(named.split(BESIDE), found.encoder.split(BESIDE), strict=True):
        if wanted != here:
            raise BaseError(
                f"the router cards were made with {_short(wanted)}, here it is {_short(here)}; get the same weights and tokenizer"
            )
    return found


def models_of(named: str) -> list[str]:
    """The models that a name as in `Encoder.encoder` speaks of. Raises `BaseError` when it is none."""
    found = [part.rpartition("@")[0] for part in named.split(BESIDE)]
    if not all(found):
        raise BaseError(f"encoder {named!r}: is no model@identity, nor several with {BESIDE!r} between; do both sides run one version?")
    return found


def _short(named: str) -> str:
    model, _, identity = named.rpartition("@")
    return f"{model} {identity[:12]}"
