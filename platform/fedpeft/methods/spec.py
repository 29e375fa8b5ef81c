"""What is known of a PEFT method: where it acts, what it trains, what averaging it means, where it may be used; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedpeft.errors import AdapterError

Family = Literal["adapter", "prompt", "scale-shift", "reparameterized", "selective", "hybrid", "quantized", "multi-task"]
"""The survey's taxonomy (Prompt tuning to PEFT, arXiv 2410.19878): the first three are additive, selective is its subtractive."""

Source = Literal["trained", "seed", "base", "index", "given"]
"""Where values come from: training, a seed of the config, the base's weights, a table of positions, or other adapters."""

Average = Literal[
    "linear",  # weights move by exactly the mean of the sites' weights
    "half-frozen",  # linear once one factor stands still: exact under alternating or ffa
    "transform",  # linear after a change of coordinates
    "bilinear",  # both factors are trained and multiply one another
    "group",  # the mean leaves the manifold (rotations)
    "normalised",  # the weight is no polynomial of the trained tensors
    "prompt",  # virtual tokens: the mean of prompts is not the prompt of the mean
    "hidden",  # hidden units between two trained matrices
    "router",  # logits that choose
]
"""What the plain mean of the trained tensors is to the mean of the sites' weights (TAXONOMY.md, section 4.1)."""

AVERAGING: dict[Average, str] = {
    "linear": "the averaged adapter's weights are exactly the mean of the sites' weights, under every scheme",
    "half-frozen": "exact while one factor stands still; with both free the product misses their covariance",
    "transform": "exact after a change of coordinates, which its scheme makes",
    "bilinear": "two trained tensors multiply: plain averaging misses their covariance across the sites",
    "group": "the mean of rotations is no rotation; averaging their skew parameters is right to first order",
    "normalised": "weights are divided by trained norms: no closed form, keep local training short and watch the drift",
    "prompt": "averaging virtual tokens is a heuristic from a common start; concatenation is the exact mixture",
    "hidden": "averaging hidden units is a heuristic from a common start; stacking them is the exact mixture",
    "router": "logits are averaged as they are; what they choose between stays per task",
}
"""What each class means for a federation, in one sentence."""

EXACT: frozenset[Average] = frozenset({"linear"})

Privacy = Literal["good", "one factor frozen", "heuristic"]
"""How client-level noise enters the weights: linearly; linearly if one factor stands still; without a bound."""

EVERY_BASE = frozenset({"none", "bf16", "fp16", "int8", "nf4", "ao-int8"})
DENSE = frozenset({"none", "bf16", "fp16"})


@dataclass(frozen=True)
class MethodSpec:
    """The facts of one method.

    ``tensors`` maps each role to where its values come from. ``exact_with`` names the schemes under which averaging is
    exact beyond what ``average`` says. ``bases`` are the quantizations on which it really trains. ``mixed_batch``: rows of
    one batch may use different adapters of this method. ``identity``: the model answers as the base does at start.
    """

    family: Family
    acts_on: str
    summary: str
    paper: str
    tensors: Mapping[str, Source]
    average: Average
    exact_with: tuple[str, ...] = ()
    mergeable: bool = False
    bases: frozenset[str] = EVERY_BASE
    mixed_batch: bool = False
    identity: bool = True
    learning_rate: float = 1e-3
    privacy: Privacy = "heuristic"
    note: str = ""

    @property
    def trained(self) -> frozenset[str]:
        """Roles that training moves."""
        return frozenset(role for role, source in self.tensors.items() if source == "trained")

    @property
    def averaging(self) -> str:
        """One phrase: exact, exact with named schemes, or heuristic."""
        if self.average in EXACT:
            return "exact"
        return f"exact with {', '.join(self.exact_with)}" if self.exact_with else "heuristic"


def check_base(kind: str, spec: MethodSpec, quantization: str) -> None:
    """Refuse a base on which the method of ``spec`` would fail, or silently become something else.

    Raises:
        AdapterError: ``quantization`` is not among ``spec.bases``.
    """
    if quantization not in spec.bases:
        raise AdapterError(
            f"{kind}: does not train on a base with quantization {quantization!r}, only on {sorted(spec.bases)}; "
            "change base.quantization, or use lora, which trains on all"
        )
