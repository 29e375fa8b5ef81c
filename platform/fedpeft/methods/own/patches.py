"""The live half of visual prompts: tokens enter before the first block, are renewed before others, leave after the last."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import begin
from fedpeft.methods.grafts import Own, blocks, graft, hidden, with_hidden
from fedpeft.methods.targets import linear_roles, reads_images

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec


def add_tokens(model: nn.Module, head: HeadSpec, tokens: int, deep: bool) -> None:
    """Prompts at the first block, or at every one. Raises `AdapterError` when ``model`` is no plain vision transformer."""
    if not reads_images(model):
        raise AdapterError(f"vpt: {type(model).__name__} takes no images; use prompt or prefix, or lora")
    found = blocks(model)
    staged = any(sum(part.isdigit() for part in name.split(".")) > 1 for name in linear_roles(model))
    if staged or len(set(found.values())) > 1:
        raise AdapterError(f"vpt: {type(model).__name__} works in stages, where tokens have places; use lora, or a ViT, DeiT or DINOv2")
    attached = begin(model, "vpt", head)
    for number, (name, width) in enumerate(found.items()):
        host = model.get_submodule(name)
        if number == 0 or deep:
            own = graft(attached, model, f"{name}.vpt", {"prompt": (tokens, width)}, None)
            kept = 1 if number == 0 else 1 + tokens
            attached.handles.append(host.register_forward_pre_hook(partial(_enter, own, kept), with_kwargs=True))
    attached.handles.append(model.get_submodule(next(reversed(found))).register_forward_hook(partial(_leave, tokens)))


def _enter(own: Own, rest: int, host: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put the prompts between the first token and those from ``rest`` on."""
    states: Tensor = args[0] if args else named["hidden_states"]
    prompt = own["prompt"].to(states.dtype).expand(len(states), -1, -1)
    states = torch.cat((states[:, :1], prompt, states[:, rest:]), dim=1)
    return ((states, *args[1:]), named) if args else (args, named | {"hidden_states": states})


def _leave(tokens: int, host: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    states = hidden(output)
    return with_hidden(output, torch.cat((states[:, :1], states[:, 1 + tokens :]), dim=1))
