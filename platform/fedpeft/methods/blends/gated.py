"""The live half of UniPELT: gated low-rank branches, prefixes and bottlenecks as hooks, token by token, in float32.

Shape legend: T tokens (any leading axes), H heads, C channels of a head, P prefix tokens, R rank.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import Attached, begin
from fedpeft.methods.branches import width_out
from fedpeft.methods.grafts import Own, bottleneck_shapes, graft, squeeze
from fedpeft.methods.targets import groups, width_in, writers

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec

QUERY = re.compile(r"(^|_)(q|query)(_|$)|^wq$", re.IGNORECASE)
Seen = dict[str, Tensor]


def add_gated(model: nn.Module, head: HeadSpec, rank: int, tokens: int, dim: int) -> None:
    """Put all three parts on ``model``. Raises `AdapterError` where one of them has no place."""
    attentions, mlps = groups(model, "attention"), writers(model, "mlp")
    if not attentions or not mlps:
        raise AdapterError(f"unipelt: {type(model).__name__} lacks attention or MLP in numbered blocks; use a transformer base")
    queries = [_query(model, names) for names in attentions] if tokens else []
    attached = begin(model, "unipelt", head)
    for name in (name for names in attentions for name in names):
        host = model.get_submodule(name)
        shapes = {"A": (rank, width_in(host)), "B": (width_out(host), rank), **_gate(width_in(host))}
        graft(attached, model, f"{name}.unipelt_lora", shapes, _low_rank)
    for name in mlps:
        width = width_out(model.get_submodule(name))
        graft(attached, model, f"{name}.unipelt_bottleneck", bottleneck_shapes(width, dim, width) | _gate(width), _bottleneck)
    for query, names in zip(queries, attentions, strict=False):
        _add_prefix(model, attached, query, names[-1], tokens)


def _gate(width: int) -> dict[str, tuple[int, ...]]:
    return {"gate.weight": (1, width), "gate.bias": (1,)}


def _query(model: nn.Module, names: list[str]) -> str:
    """The layer of an attention whose output begins with the queries. Raises `AdapterError` when there is none."""
    width = width_in(model.get_submodule(names[-1]))
    for name in names:
        host = model.get_submodule(name)
        alone = QUERY.search(name.rpartition(".")[2]) and width_out(host) == width
        if alone or (hasattr(host, "nf") and width_out(host) == 3 * width):  # GPT-2 lays queries, keys and values side by side
            return name
    raise AdapterError(
        f"unipelt: the attention of {type(model).__name__} has no query layer of its own, which a prefix reads; set method.tokens = 0"
    )


def _add_prefix(model: nn.Module, attached: Attached, query: str, writer: str, tokens: int) -> None:
    """Keys and values of (H, P, C) that change what ``writer`` reads, queried by what ``query`` puts out."""
    source, host, seen = model.get_submodule(query), model.get_submodule(writer), Seen()
    config: Any = model.config
    many, width = config.get_text_config().num_attention_heads, width_in(host)
    if not isinstance(many, int):
        raise AdapterError(
            f"unipelt: {type(model).__name__} has stages with {many} heads, and a prefix needs one number; set method.tokens = 0"
        )
    heads = many
    kept = (heads, tokens, width // heads)
    own = graft(attached, model, f"{writer}.unipelt_prefix", {"keys": kept, "values": kept, **_gate(width_in(source))}, None)
    attached.handles.append(source.register_forward_hook(partial(_remember, seen, width)))
    attached.handles.append(host.register_forward_pre_hook(partial(_attend, seen, own)))


def _open(own: Own, states: Tensor) -> Tensor:
    """The gate of every token: (T, 1)."""
    return F.linear(states, own["gate.weight"], own["gate.bias"]).sigmoid()


def _low_rank(own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    states = inputs[0].float()
    return output + (_open(own, states) * F.linear(F.linear(states, own["A"]), own["B"])).to(output.dtype)


def _bottleneck(own: Own, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + (_open(own, output.float()) * squeeze(own, output)).to(output.dtype)


def _remember(seen: Seen, width: int, host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    seen["states"], seen["queries"] = inputs[0].float(), output[..., :width].float()


def _attend(seen: Seen, own: Own, host: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Context plus what the gated prefix answers to the queries: (T, H C)."""
    context, (states, queries) = inputs[0], (seen.pop("states"), seen.pop("queries"))
    answer = prefix_attention(queries.reshape(context.shape), own["keys"], own["values"])
    return (context + (_open(own, states).reshape(*context.shape[:-1], 1) * answer).to(context.dtype), *inputs[1:])


def prefix_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``softmax(q k / sqrt(C)) v`` per head: queries (T, H C), keys and values (H, P, C) -> (T, H C)."""
    heads, _, channels = keys.shape
    cut = queries.view(*queries.shape[:-1], heads, channels)
    shares = (torch.einsum("...hc,hpc->...hp", cut, keys) / channels**0.5).softmax(-1)
    return torch.einsum("...hp,hpc->...hc", shares, values).flatten(-2)
