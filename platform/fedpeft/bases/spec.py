"""Plain values about a base that every floor may hold: which model, how it is quantized, its head, its fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fedpeft.errors import BaseError

Quantization = Literal["none", "bf16", "fp16", "int8", "nf4", "ao-int8"]
QUANTIZED: tuple[Quantization, ...] = ("int8", "nf4", "ao-int8")
"""Those whose linear layers hold codes and scales."""
HALF: tuple[Quantization, ...] = ("bf16", "fp16")
"""Those that hold all weights in two bytes."""
Family = Literal["encoder", "causal", "seq2seq", "vision"]
CLASSIFIERS: tuple[Family, ...] = ("encoder", "vision")
"""Those that write no text, so that their tasks are classification."""
LAST = "last_hidden_state"
"""What `Base.watch` calls the trunk's output, where modules are named whose inputs are wanted."""
ROUNDING: dict[str, float] = {"int8": 0.1, "bf16": 0.05, "fp16": 0.02}
"""Largest distance of logits, over the largest, that is rounding alone where layers round what they read; elsewhere `EXACT`."""
EXACT = 1e-3


def rounding(quantization: str) -> float:
    """The share of the largest logit that two ways of computing the same may differ by on a base of this quantization."""
    return ROUNDING.get(quantization, EXACT)


@dataclass(frozen=True)
class BaseSpec:
    """Which frozen model, and how it lies in memory.

    ``model`` is an alias (``minilm``), a folder or a hub id; ``quantization`` is ``none`` (fp32), ``bf16``, ``fp16`` (for
    cards of before 2020, which multiply bf16 no faster than fp32), ``int8`` and ``nf4`` (bitsandbytes) or ``ao-int8`` (torchao,
    weights only); ``revision`` pins a hub id; longer texts are cut to ``max_tokens`` tokens, of
    which images know nothing.
    """

    model: str
    quantization: Quantization = "none"
    revision: str | None = None
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.quantization not in get_args(Quantization):
            raise BaseError(
                f"base {self.model}: quantization {self.quantization!r} is unknown; choose one of {list(get_args(Quantization))}"
            )
        if self.max_tokens < 1:
            raise BaseError(f"base {self.model}: max_tokens is {self.max_tokens}; it must be at least 1")


def rooted_model(folder: Path, model: str) -> str:
    """A ``model`` that looks like a path is one, relative to ``folder``; everything else is an alias or a hub id, as it is."""
    return str(folder / Path(model).expanduser()) if model.startswith((".", "~")) else model


@dataclass(frozen=True)
class HeadSpec:
    """What sits on the trunk: a classifier over ``labels``, or the language model's own head."""

    kind: Literal["classification", "lm"]
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("classification", "lm"):
            raise BaseError(f"head: kind {self.kind!r} is unknown; choose 'classification' or 'lm'")
        if self.kind == "classification" and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise BaseError(f"head: labels are {list(self.labels)}; a classification head needs two or more different ones")
        if self.kind == "lm" and self.labels:
            raise BaseError(f"head: a language-model head has no labels, {list(self.labels)} were given; use kind 'classification'")


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 of what a base is made of; ``weights`` covers the architecture settings too, ``quantization`` is as in `BaseSpec`.

    ``tokenizer`` is of what makes rows into inputs, an image processor's settings among it.
    """

    weights: str
    tokenizer: str
    template: str
    quantization: str

    @property
    def identity(self) -> str:
        """What must agree between all sites and the coordinator: weights, tokenizer and chat template."""
        return hashlib.sha256("\n".join((self.weights, self.tokenizer, self.template)).encode()).hexdigest()
