"""Which linear layers a method touches: found by role in the modules at hand, never by a table of names.

A block is whatever lies in a numbered list of the trunk. Inside a block, a linear layer under a module whose name or
class says attention is of the role ``attention``, any other of the role ``mlp``. Head, embeddings and pooler lie outside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from fedpeft.errors import AdapterError

ROLES = ("attention", "mlp", "all")
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
ATTENTION_CLASS = re.compile(r"(attention|attn)$", re.IGNORECASE)
KEY_VALUE = re.compile(r"(^|_)(k|v|kv|key|value)(_|$)|^w[kv]$", re.IGNORECASE)
PATTERN = re.compile(r"[\\^$*+?()\[\]{}|]")


def trunk_name(model: nn.Module) -> str:
    """Attribute of ``model`` that holds the trunk; empty when the model is itself the trunk."""
    name = str(getattr(model, "base_model_prefix", ""))
    return name if name and isinstance(getattr(model, name, None), nn.Module) else ""


def reads_images(model: nn.Module) -> bool:
    """Whether ``model`` takes pixels, and has no table of tokens."""
    return getattr(model, "main_input_name", "") == "pixel_values"


def token_table(model: nn.Module, kind: str) -> Any:
    """The embeddings of tokens that ``model`` reads. Raises `AdapterError` naming the method when it reads images."""
    if reads_images(model):
        raise AdapterError(
            f"{kind}: {type(model).__name__} reads images, and this method works on tokens; use vpt, lora, ia3 or bottleneck"
        )
    return model.get_input_embeddings()  # type: ignore[operator]


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a dense layer: ``nn.Linear`` and its quantized kinds, or GPT-2's transposed ``Conv1D``."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def linear_roles(model: nn.Module) -> dict[str, str]:
    """Module name -> ``attention`` or ``mlp`` for every linear layer in the trunk's blocks, in module order.

    A layer that peft has wrapped counts as the layer it wraps; what lies inside a linear layer is an adapter's and does not count.
    """
    trunk = trunk_name(model)
    prefix = f"{trunk}." if trunk else ""
    inside = {name: module for name, module in model.named_modules() if name.startswith(prefix)}
    found: dict[str, str] = {}
    last = ""
    for name, module in inside.items():
        if is_linear(bare(module)) and _in_block(name) and not (last and name.startswith(f"{last}.")):
            found[name], last = _role(name, inside), name
    return found


def resolve(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that ``targets`` select: roles, name suffixes such as ``q_proj``, or regular expressions.

    Raises:
        AdapterError: a target selects nothing.
    """
    roles = linear_roles(model)
    chosen: set[str] = set()
    for target in targets:
        found = {name for name, role in roles.items() if _selects(target, name, role)}
        if not found:
            seen = sorted({name.rpartition(".")[2] for name in roles})
            raise AdapterError(
                f"targets: {target!r} selects no linear layer of {type(model).__name__}; use one of {list(ROLES)} or one of {seen}"
            )
        chosen |= found
    return [name for name in roles if name in chosen]


def groups(model: nn.Module, role: str) -> list[list[str]]:
    """Linear layers of every attention, or of every MLP, in module order."""
    owned: dict[str, list[str]] = {}
    for name, found in linear_roles(model).items():
        if found == role:
            owned.setdefault(_owner(name, role), []).append(name)
    return list(owned.values())


def writers(model: nn.Module, role: str) -> list[str]:
    """The last linear layer of every attention, or of every MLP: the one that writes back to the hidden state."""
    return [names[-1] for names in groups(model, role)]


def keys_and_values(model: nn.Module) -> list[str]:
    """Key and value projections of every attention; where they are fused with the query, the fused layer."""
    found = []
    for names in groups(model, "attention"):
        named = [name for name in names if KEY_VALUE.search(name.rpartition(".")[2])]
        found += named or names[:-1]
    return found


def width_in(module: Any) -> int:
    """Input features of a linear layer."""
    return int(module.nx if hasattr(module, "nx") else module.in_features)


def families(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """``names`` in groups of layers that read one input: siblings of one attention or MLP, but for those that write back.

    In an encoder-decoder keys and values may read another input than queries, so there each layer stands alone.
    """
    alone = {*writers(model, "attention"), *writers(model, "mlp")}
    mixed = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        own = name if mixed or name in alone else name.rpartition(".")[0]
        groups.setdefault((own, width_in(model.get_submodule(name))), []).append(name)
    return list(groups.values())


def _owner(name: str, role: str) -> str:
    """The innermost numbered parent, and within it the outermost part that says attention."""
    parents = name.split(".")[:-1]
    end = max((i for i, part in enumerate(parents) if part.isdigit()), default=-1) + 1
    attention = (i + 1 for i in range(end, len(parents)) if role == "attention" and ATTENTION.search(parents[i]))
    return ".".join(parents[: next(attention, end)])


def bare(module: nn.Module) -> nn.Module:
    """The layer inside all wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _role(name: str, inside: dict[str, nn.Module]) -> str:
    parts = name.split(".")
    first = next(i for i, part in enumerate(parts) if part.isdigit()) + 1
    parents = (".".join(parts[:end]) for end in range(first, len(parts)))
    named = any(ATTENTION.search(part) for part in parts[first:])
    return "attention" if named or any(ATTENTION_CLASS.search(type(inside[parent]).__name__) for parent in parents) else "mlp"


def _selects(target: str, name: str, role: str) -> bool:
    if target in ROLES:
        return target in ("all", role)
    if PATTERN.search(target):
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")
