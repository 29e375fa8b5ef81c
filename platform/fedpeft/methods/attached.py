"""What all methods share on a live model: the mark of what is attached, the head, peft's injection and its undoing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fedpeft.errors import AdapterError
from fedpeft.methods.targets import trunk_name

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec

ADAPTER = "fp"
"""The adapter's name inside peft: fixed, so that it can never be a digit or a module's name, which loses tensors on save."""

MARK = "_fedpeft_attached"


@dataclass
class Attached:
    """What was put on a shell: the method's kind, the head's and its own parameters by name, and how to undo it."""

    kind: str
    head: dict[str, nn.Parameter]
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)
    before: dict[int, nn.Parameter] = field(default_factory=dict)
    """The parameters, by id, that the model had before: those of a hybrid's earlier parts are among them. Held, so that no id is reused."""


def begin(model: nn.Module, kind: str, head: HeadSpec) -> Attached:
    """Freeze ``model`` but its classification head, and mark it.

    Raises:
        AdapterError: another adapter is attached, or a classification shell has no head.
    """
    if hasattr(model, MARK):
        raise AdapterError(f"{kind}: {getattr(model, MARK).kind} is still attached to this {type(model).__name__}; detach it first")
    attached = Attached(kind, head_parameters(model) if head.kind == "classification" else {})
    attached.before = {id(parameter): parameter for parameter in model.parameters()}
    model.requires_grad_(False)
    thaw(attached, model)
    object.__setattr__(model, MARK, attached)
    return attached


def attached_to(model: nn.Module) -> Attached:
    """The mark of ``model``. Raises `AdapterError` when nothing is attached."""
    if not hasattr(model, MARK):
        raise AdapterError(f"{type(model).__name__} carries no adapter; call attach first and use the module that it returns")
    found: Attached = getattr(model, MARK)
    return found


def end(model: nn.Module) -> None:
    """Remove hooks, undo changes, remove the mark."""
    attached = attached_to(model)
    for handle in attached.handles:
        handle.remove()
    for undo in reversed(attached.undo):
        undo()
    object.__delattr__(model, MARK)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a shell outside its trunk. Raises `AdapterError` when there are none."""
    trunk = trunk_name(model)
    found = {name: p for name, p in model.named_parameters() if trunk and not name.startswith(f"{trunk}.")}
    if not found:
        raise AdapterError(f"head: {type(model).__name__} has no parameters outside its trunk; a classification shell is needed")
    return found


def thaw(attached: Attached, model: nn.Module) -> None:
    """Let the head train, in float32 whatever the trunk's dtype."""
    for name, parameter in attached.head.items():
        parameter.requires_grad_(True)
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
            owner = model.get_submodule(name.rpartition(".")[0])
            attached.handles.append(owner.register_forward_pre_hook(_widen))


def inject(model: nn.Module, config: Any, attached: Attached) -> None:
    """Let peft put ``config`` on ``model``, without touching torch's random state; adapters and head stay float32.

    Raises:
        AdapterError: peft cannot; ``model`` is then as before.
    """
    from peft import inject_adapter_in_model

    # on a base without weights peft would draw every value, only to throw it away
    place = torch.device("meta") if next(model.parameters()).is_meta else nullcontext()
    try:
        with torch.random.fork_rng(devices=[]), place:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError, RuntimeError) as fault:
        eject(model)
        end(model)
        raise AdapterError(
            f"{attached.kind}: peft cannot put it on {type(model).__name__}: {fault}; choose other targets or method"
        ) from fault
    model.train(model.training)  # new layers are born in training mode
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in attached.head:
            parameter.data = parameter.data.float()
    for parameter in attached.head.values():
        parameter.requires_grad_(True)


def eject(model: nn.Module) -> None:
    """Put the layers that this attachment's peft layers wrap back in their places."""
    before = attached_to(model).before
    for name, layer in wrapped(model).items():
        if any(id(parameter) not in before for key, parameter in layer.named_parameters() if not key.startswith("base_layer.")):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config


def wrapped(model: nn.Module) -> dict[str, Any]:
    """Module name -> layer that peft put around a module of the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def injected(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's saved key -> parameter of every tensor that this attachment's peft layers hold under our adapter's name."""
    marker, found = f".{ADAPTER}", {}
    before = attached_to(model).before
    for name, parameter in model.named_parameters():
        if id(parameter) not in before and (f"{marker}." in name or name.endswith(marker)):
            found[f"base_model.model.{name.replace(marker, '', 1)}"] = parameter
    return found


def head_entries(model: nn.Module, prefix: str = "base_model.model.") -> dict[str, tuple[str, nn.Parameter]]:
    """The classification head's entries, if the shell trains one."""
    return {f"{prefix}{name}": ("head", parameter) for name, parameter in attached_to(model).head.items()}


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in inputs)
