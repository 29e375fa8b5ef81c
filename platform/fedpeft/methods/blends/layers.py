"""The live half of composition: methods laid on one model, one around the other, and lifted in reverse."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import MARK, Attached, attached_to
from fedpeft.methods.tuners.tree import Tree

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec
    from fedpeft.methods.protocol import Entries, Method

Marks = list[tuple[nn.Module, Attached]]


@dataclass
class Layer:
    """One part at work: the module that its `attach` returned, and its marks, which are off the model while others are laid."""

    part: Method
    live: nn.Module
    marks: Marks


@dataclass
class Layers(Attached):
    """The mark of a hybrid: its parts in the order they were laid, and what they train."""

    layers: list[Layer] = field(default_factory=list)
    found: Entries = field(default_factory=dict)
    outer: list[nn.Module] = field(default_factory=list)
    trains: set[int] = field(default_factory=set)


def lay_all(parts: Sequence[Method], model: nn.Module, head: HeadSpec) -> nn.Module:
    """Attach ``parts`` to ``model``, each around the last, and mark the result as one adapter.

    Raises:
        AdapterError: a part refuses, two parts hold tensors of one name, or two wrap the whole model; ``model`` is then as before.
    """
    if hasattr(model, MARK):
        raise AdapterError(f"compose: {attached_to(model).kind} is still attached to this {type(model).__name__}; detach it first")
    whole, tree = Layers("compose", {}), Tree.of(model)
    try:
        for part in parts:
            _lay(whole, part, model, head)
    except BaseException:
        if hasattr(model, MARK):
            object.__delattr__(model, MARK)
        tree.restore()  # parts that overwrote one another cannot be trusted to undo what they did
        raise
    live = whole.layers[-1].live
    whole.outer = list({id(module): module for module in (model, live)}.values())
    for module in whole.outer:
        object.__setattr__(module, MARK, whole)
    return live


def entries_of(model: nn.Module) -> Entries:
    """What the parts on ``model`` train. Raises `AdapterError` when it carries no hybrid."""
    return dict(_layers(model).found)


def lift_all(model: nn.Module) -> None:
    """Detach all parts, the last first. Raises `AdapterError` when ``model`` carries no hybrid."""
    whole = _layers(model)
    for module in whole.outer:
        object.__delattr__(module, MARK)
    _lift(whole)


def _layers(model: nn.Module) -> Layers:
    mark = attached_to(model)
    if not isinstance(mark, Layers):
        raise AdapterError(f"compose: {mark.kind} is attached to this {type(model).__name__}, not a hybrid; use its own method")
    return mark


def _lay(whole: Layers, part: Method, model: nn.Module, head: HeadSpec) -> None:
    if whole.layers and whole.layers[-1].live is not model:
        raise AdapterError(f"compose: {whole.layers[-1].part.kind} and {part.kind} both wrap the whole model; use one soft prompt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")  # on purpose
        live = part.attach(model, head)
    entries = part.entries(live)
    _check_names(whole, part, entries)
    trains = [parameter for _, parameter in entries.values() if parameter.requires_grad]
    known = {id(parameter) for _, parameter in whole.found.values()}
    whole.layers.append(Layer(part, live, _take_marks(live, model)))
    for parameter in [p for _, p in whole.found.values() if id(p) in whole.trains]:
        parameter.requires_grad_(True)  # attaching freezes all that was there
    whole.found |= {name: entry for name, entry in entries.items() if id(entry[1]) not in known}
    whole.trains |= {id(parameter) for parameter in trains}
    if hasattr(model, "peft_config"):
        del model.peft_config  # or peft takes the next part for a second adapter of this one


def _check_names(whole: Layers, part: Method, entries: Entries) -> None:
    for name, (role, _) in entries.items():
        if role != "head" and name in whole.found:
            raise AdapterError(f"compose: {part.kind} holds {name}, which an earlier part holds; choose other targets, or one of the parts")


def _take_marks(live: nn.Module, model: nn.Module) -> Marks:
    marks: Marks = []
    for module in {id(module): module for module in (live, model)}.values():
        if hasattr(module, MARK):
            marks.append((module, attached_to(module)))
    for module, _ in marks:
        object.__delattr__(module, MARK)
    return marks


def _lift(whole: Layers) -> None:
    while whole.layers:
        layer = whole.layers.pop()
        for module, mark in layer.marks:
            object.__setattr__(module, MARK, mark)
        layer.part.detach(layer.live)
