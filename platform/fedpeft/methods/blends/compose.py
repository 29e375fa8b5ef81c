"""Hybrids by composition: several methods on one base at once, trained, saved and averaged as one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from fedpeft.config import build, describe
from fedpeft.errors import AdapterError
from fedpeft.methods import values
from fedpeft.methods.bottleneck import Bottleneck
from fedpeft.methods.lora import Lora
from fedpeft.methods.protocol import Method
from fedpeft.methods.spec import EVERY_BASE, Average, MethodSpec
from fedpeft.tensors import Entry, Layout

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec
    from fedpeft.methods.protocol import Entries

ORDER: tuple[Average, ...] = (
    "linear",
    "transform",
    "half-frozen",
    "bilinear",
    "group",
    "router",
    "hidden",
    "prompt",
    "normalised",
)
"""Classes of averaging, the mildest first: a hybrid averages as its hardest part does."""


def _part(value: Any) -> Any:
    from fedpeft.methods import METHODS

    return build(METHODS, value, "part")


def check_parts(parts: Sequence[Method]) -> Sequence[Method]:
    """``parts`` themselves. Raises `ValueError` for a part of a kind that another has, a hybrid, or a role with two learning rates."""
    kinds = [part.kind for part in parts]
    if len(set(kinds)) < len(kinds) or Compose.kind in kinds:
        raise ValueError(f"compose: parts are {kinds}; every part needs a kind of its own, and none may be a compose")
    for role in sorted(set().union(*(spec_of(part).tensors for part in parts))):
        scales = {part.kind: part.lr_scale(role) for part in parts if role in spec_of(part).tensors}
        if len(set(scales.values())) > 1:
            raise ValueError(f"compose: role {role} has learning-rate scales {scales}; set the parts' alpha, r or scale so that they agree")
    return parts


Part = Annotated[Any, BeforeValidator(_part), PlainSerializer(describe)]
Parts = Annotated[tuple[Part, ...], Field(min_length=2), AfterValidator(check_parts)]


@dataclass(frozen=True)
class Compose:
    """Several methods as one: ``parts = ["prefix", "parallel"]`` is MAM (arXiv 2110.04366), lora with sparse-magnitude RoSA (2401.04679).

    Parts are put on in the order listed, each around what lies there already, soft prompts last; they come off in reverse. A tensor
    keeps the name and the role that it has alone: parts that share a role (down and up of two bottlenecks) are one role to every
    scheme, which is what the role means to it, and so must share its learning-rate scale.
    """

    kind: ClassVar[str] = "compose"

    parts: Parts = (Lora(), Bottleneck())

    @property
    def needs_weights(self) -> bool:
        """Whether any part does."""
        return any(part.needs_weights for part in self.parts)

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Put all parts on and return the module to call.

        Raises:
            AdapterError: a part cannot be put on, two parts hold tensors of one name, or two wrap the whole model.
        """
        from fedpeft.methods.blends.layers import lay_all

        return lay_all(sorted(self.parts, key=wraps), model, head)

    def entries(self, model: nn.Module) -> Entries:
        """Those of all parts, the head once."""
        from fedpeft.methods.blends.layers import entries_of

        return entries_of(model)

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """What the parts with the tensor's role give.

        Raises:
            AdapterError: parts that share the role start it differently.
        """
        owners = [part for part in self.parts if entry.role in spec_of(part).tensors] or self.parts[:1]
        drawn: list[NDArray[np.float32] | None] = [part.initial(entry, deepcopy(rng), config) for part in owners]
        if any(not _same(drawn[0], other) for other in drawn[1:]):
            raise AdapterError(f"compose: parts {[p.kind for p in owners]} start role {entry.role} differently; train them as two adapters")
        return drawn[0]

    def lr_scale(self, role: str) -> float:
        """That of the parts with this role."""
        return next((part.lr_scale(role) for part in self.parts if role in spec_of(part).tensors), 1.0)

    def peft_config(self, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
        """A type that peft refuses, since its mixed models cannot be saved: only fedpeft loads it."""
        table = {"peft_type": "FEDPEFT_COMPOSE", "parts": [describe(part) for part in self.parts]}
        return values.common(base_model, head, layout) | table | {"modules_to_save": values.head_modules(layout)}

    def detach(self, model: nn.Module) -> None:
        """Take the parts off, the last one first."""
        from fedpeft.methods.blends.layers import lift_all

        lift_all(model)


def _same(one: NDArray[np.float32] | None, two: NDArray[np.float32] | None) -> bool:
    return one is two if one is None or two is None else np.array_equal(one, two)


def spec_of(method: Method) -> MethodSpec:
    """The facts of ``method``; those of a hybrid follow from its parts."""
    from fedpeft.methods import SPECS

    return combined(method.parts) if isinstance(method, Compose) else SPECS[method.kind]


def wraps(method: Method) -> bool:
    """Whether ``method`` returns another module than it was attached to, and so goes on last."""
    return spec_of(method).family == "prompt"


def combined(parts: Sequence[Method]) -> MethodSpec:
    """The facts of several methods at once: what all of them can, and the hardest of their averages."""
    return merged({part.kind: spec_of(part) for part in parts})


def merged(specs: dict[str, MethodSpec]) -> MethodSpec:
    """As `combined`, from the facts by kind."""
    facts = list(specs.values())
    multiplies = any(fact.family in ("scale-shift", "quantized") for fact in facts)  # its factors times what the others train
    averages: list[Average] = [fact.average for fact in facts] + (["bilinear"] if multiplies else [])
    hard = [fact.exact_with for fact in facts if fact.average != "linear"]
    exact = () if multiplies or not hard else tuple(scheme for scheme in hard[0] if all(scheme in others for others in hard))
    return MethodSpec(
        family="hybrid",
        acts_on="; ".join(dict.fromkeys(fact.acts_on for fact in facts)),
        summary=" + ".join(specs) + " as one adapter",
        paper="; ".join(dict.fromkeys(fact.paper for fact in facts)),
        tensors={role: source for fact in facts for role, source in fact.tensors.items()},
        average=max(averages, key=ORDER.index),
        exact_with=exact,
        mergeable=all(fact.mergeable for fact in facts),
        bases=EVERY_BASE.intersection(*(fact.bases for fact in facts)),
        identity=all(fact.identity for fact in facts),
        learning_rate=min(fact.learning_rate for fact in facts),
        privacy=max((fact.privacy for fact in facts), key=("good", "one factor frozen", "heuristic").index),
    )
