"""Soft prompts made of prompts: a shared prompt that a task rescales (MPT), and an attention mixture of source prompts (ATTEMPT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.errors import AdapterError
from fedpeft.methods import values
from fedpeft.methods.blends.fusion import Names
from fedpeft.tensors import Entry, Layout, Tensors

if TYPE_CHECKING:
    from torch import nn

    from fedpeft.bases.spec import HeadSpec
    from fedpeft.methods.protocol import Entries

from fedpeft.methods.soft import NAME as PROMPT

SOURCES = f"{PROMPT}.sources."


@dataclass(frozen=True)
class Mpt:
    """``P = P* o (u v')``: a prompt that tasks share, rescaled by a task's rank-one matrix (Wang et al. 2023, arXiv 2303.02861).

    The paper distils P* from several tasks; here any prompt can be it: the roles tell P* (``prompt``) from the task's own (``row``, u,
    ``column``, v), so that a scheme may move one and keep the other. u and v are ones at start, so P is P*.
    """

    kind: ClassVar[str] = "mpt"
    needs_weights: ClassVar[bool] = False

    tokens: Annotated[int, Field(ge=1)] = 16

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Return a module around ``model`` that puts the prompt before its input. Raises `AdapterError` as `PromptTuning`."""
        from fedpeft.methods.blends.prompting import rescaled

        return rescaled(model, head, self.tokens)

    def entries(self, model: nn.Module) -> Entries:
        """Roles prompt, row, column and head."""
        return _entries(model, {PROMPT: "prompt", f"{PROMPT}.row": "row", f"{PROMPT}.column": "column"})

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """P* small, u and v ones, head fresh."""
        if entry.role in ("row", "column"):
            return np.ones(entry.shape, np.float32)
        return values.head(entry, rng, config) if entry.role == "head" else _small(entry, rng, config)

    def lr_scale(self, role: str) -> float:
        """Nothing is folded."""
        return 1.0

    def peft_config(self, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
        """A type that peft refuses: it would ignore u and v."""
        table = {"peft_type": "FEDPEFT_MPT", "num_virtual_tokens": self.tokens, "modules_to_save": values.head_modules(layout)}
        return values.common(base_model, head, layout) | table

    def detach(self, model: nn.Module) -> None:
        """Let go of the shell, which was never changed."""
        from fedpeft.methods.prompted import release

        release(model)


@dataclass(frozen=True)
class Attempt:
    """``P(x) = P_t + sum_j a_j(x) P_j`` over frozen source prompts and P_t itself (Asai et al. 2022, arXiv 2205.11961).

    ``a(x)`` is a softmax over ``P^_j' LayerNorm(up silu(down x^)) / (temperature sqrt(D))``, ``^`` the maximum over tokens, x the row's
    embeddings of width D. ``sources`` names the prompts; their tensors have the role ``expert`` (part of the adapter, never trained
    or averaged) and come by `fill`. Each row of a batch has its own mixture. Classification alone: a causal model's rows hold the
    answers that it learns.
    """

    kind: ClassVar[str] = "attempt"
    needs_weights: ClassVar[bool] = False

    sources: Names = ("first", "second")
    tokens: Annotated[int, Field(ge=1)] = 16
    dim: Annotated[int, Field(ge=1)] = 32
    temperature: Annotated[float, Field(gt=0)] = 1.0

    def attach(self, model: nn.Module, head: HeadSpec) -> nn.Module:
        """Return a module around ``model`` that puts the mixture before its input. Raises `AdapterError` as `PromptTuning`."""
        from fedpeft.methods.blends.prompting import attentive

        return attentive(model, head, self)

    def entries(self, model: nn.Module) -> Entries:
        """Roles prompt, expert, down, up, norm and head."""
        chooser = {f"{PROMPT}.{name}": name.partition(".")[0] for name in ("down.weight", "up.weight", "norm.weight", "norm.bias")}
        return _entries(model, {PROMPT: "prompt", **chooser, **{f"{SOURCES}{name}": "expert" for name in self.sources}})

    def initial(self, entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32] | None:
        """Prompts small, ``down`` and ``up`` uniform over their fan-in, norm as it is born, head fresh."""
        if entry.role == "head":
            return values.head(entry, rng, config)
        if entry.role == "norm":
            return np.full(entry.shape, float(entry.name.endswith("weight")), np.float32)
        return values.uniform_fan_in(entry, rng) if entry.role in ("down", "up") else _small(entry, rng, config)

    def lr_scale(self, role: str) -> float:
        """Nothing is folded."""
        return 1.0

    def peft_config(self, base_model: str, head: HeadSpec, layout: Layout) -> dict[str, Any]:
        """A type that peft refuses, since it has no such method."""
        table = {"peft_type": "FEDPEFT_ATTEMPT", "num_virtual_tokens": self.tokens, "sources": list(self.sources)}
        return values.common(base_model, head, layout) | table | {"modules_to_save": values.head_modules(layout)}

    def detach(self, model: nn.Module) -> None:
        """Let go of the shell, which was never changed."""
        from fedpeft.methods.prompted import release

        release(model)


def fill(mixture: Tensors, sources: Mapping[str, Tensors]) -> Tensors:
    """``mixture`` with trained prompts (method ``prompt``) as its sources.

    Raises:
        AdapterError: a source is not among ``sources``, or its prompt has another shape.
    """
    part = mixture.pick({"expert"})
    named = {name: _source(name.removeprefix(SOURCES), view.shape, sources) for name, view in part.named().items()}
    return mixture.patch(Tensors.from_named(part.layout, named))


def _source(who: str, shape: tuple[int, ...], sources: Mapping[str, Tensors]) -> NDArray[np.float32]:
    if who not in sources:
        raise AdapterError(f"attempt: no adapter was given for source {who!r}; given are {sorted(sources)}")
    found = sources[who].named().get(PROMPT)
    if found is None or found.shape != shape:
        seen = "holds no prompt" if found is None else f"has shape {list(found.shape)}"
        raise AdapterError(f"attempt: source {who!r} {seen}, {list(shape)} is needed; give adapters of method prompt with the same tokens")
    return found


def _entries(model: nn.Module, roles: Mapping[str, str]) -> Entries:
    from fedpeft.methods.attached import attached_to, head_entries

    own = attached_to(model).own
    return {name: (role, own[name]) for name, role in roles.items()} | head_entries(model, "base_model.")


def _small(entry: Entry, rng: np.random.Generator, config: Any) -> NDArray[np.float32]:
    return values.normal(entry, rng, float(getattr(config, "initializer_range", None) or 0.02))
