"""The live half of X-LoRA: a first pass of the trunk without experts, whose last hidden state says how much each counts where.

Shape legend: T tokens (any leading axes), L adapted layers, E experts, R rank, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import begin
from fedpeft.methods.branches import width_out
from fedpeft.methods.grafts import Own, graft
from fedpeft.methods.targets import resolve, trunk_name, width_in

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec


@dataclass
class Scaling:
    """The shares (T, L, E) of the forward under way, None in its first pass and between forwards; the cache of first passes."""

    shape: tuple[int, int]
    shares: Tensor | None = None
    cache: Any = None


def add_scaled(model: nn.Module, head: HeadSpec, targets: Sequence[str], experts: Sequence[str], rank: int) -> None:
    """Frozen experts on every target layer, one router on the trunk.

    Raises:
        AdapterError: a target selects nothing, or encoder and decoder read tokens of their own, which one last hidden state cannot weigh.
    """
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise AdapterError(f"xlora: {type(model).__name__} has an encoder and a decoder; use hydralora or molora, or a base of one stack")
    names = resolve(model, targets)
    if not isinstance(getattr(config.get_text_config(), "hidden_size", None), int):
        raise AdapterError(f"xlora: {type(model).__name__} has no one hidden size, which its router reads; use lora")
    attached = begin(model, "xlora", head)
    scaling = Scaling((len(names), len(experts)))
    for place, name in enumerate(names):
        host = model.get_submodule(name)
        shapes = {
            f"expert.{e}.{part}": shape for e in experts for part, shape in (("A", (rank, width_in(host))), ("B", (width_out(host), rank)))
        }
        own = graft(attached, model, f"{name}.xlora", shapes, partial(_apply, scaling, (place, tuple(experts))))
        for parameter in own.values():
            parameter.requires_grad_(False)
    many, width, trunk = len(names) * len(experts), int(config.get_text_config().hidden_size), trunk_name(model)
    router = graft(attached, model, f"{trunk}.xlora".lstrip("."), {"router.weight": (many, width), "router.bias": (many,)}, None)
    whole = model.get_submodule(trunk)
    attached.handles.append(whole.register_forward_pre_hook(partial(_look, scaling, router), with_kwargs=True))
    attached.handles.append(whole.register_forward_hook(partial(_forget, scaling)))


def _look(scaling: Scaling, router: Own, trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The first pass: the trunk as it is without experts, then the shares of all layers."""
    scaling.shares = None
    with torch.no_grad():
        hidden = trunk.forward(*args, **{**kwargs, **_cached(scaling, kwargs)})[0].float()
    logits = F.linear(hidden, router["router.weight"], router["router.bias"])
    scaling.shares = logits.view(*logits.shape[:-1], *scaling.shape).softmax(-1)


def _forget(scaling: Scaling, *_seen: Any) -> None:
    """Shares are of one forward; where a backward pass may compute layers again they stay until the next."""
    if not torch.is_grad_enabled():
        scaling.shares = None


def _cached(scaling: Scaling, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A cache of first passes beside the caller's, so that both read the whole text. Raises `AdapterError` for one filled elsewhere."""
    past = kwargs.get("past_key_values")
    if past is None:
        return {"use_cache": False} if "use_cache" in kwargs else {}
    if past.get_seq_length() == 0:
        scaling.cache = type(past)()
    if scaling.cache is None or scaling.cache.get_seq_length() != past.get_seq_length():
        raise AdapterError("xlora: the key-value cache was filled by another model or text; begin the text anew, or set use_cache = false")
    return {"past_key_values": scaling.cache}


def _apply(scaling: Scaling, at: tuple[int, tuple[str, ...]], own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """``output + sum_e s_e B_e A_e x``: the shares scale the stacked ranks; ``at`` is the layer's number, and the experts."""
    place, experts = at
    if scaling.shares is None:
        return output
    states = inputs[0].float()
    low = F.linear(states, torch.cat([own[f"expert.{e}.A"] for e in experts])).view(*states.shape[:-1], len(experts), -1)
    scaled = low * scaling.shares[..., place, :].reshape(*states.shape[:-1], len(experts), 1)
    return output + F.linear(scaled.flatten(-2), torch.cat([own[f"expert.{e}.B"] for e in experts], 1)).to(output.dtype)
