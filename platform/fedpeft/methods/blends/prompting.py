"""The live half of prompts made of prompts: peft's prompt model with another prompt.

Shape legend: B rows, T tokens, P prompt tokens, D width, S source prompts and the target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import ADAPTER, attached_to
from fedpeft.methods.soft import PromptTuning

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec
    from fedpeft.methods.blends.prompts import Attempt

from fedpeft.methods.soft import NAME as PROMPT


def rescaled(model: nn.Module, head: HeadSpec, tokens: int) -> nn.Module:
    """``model`` behind the prompt ``P* o (u v')``. Raises `AdapterError` as `PromptTuning`."""
    live: Any = PromptTuning(tokens).attach(model, head)
    encoder = live.inner.prompt_encoder[ADAPTER]
    width = encoder.embedding.weight.shape[1]
    own = _hang(live, "mpt", {"row": (tokens, 1), "column": (1, width)})
    encoder.register_forward_hook(lambda _module, _inputs, prompt: prompt * (own["row"] @ own["column"]))
    return live  # type: ignore[no-any-return]


def attentive(model: nn.Module, head: HeadSpec, method: Attempt) -> nn.Module:
    """``model`` behind a mixture of prompts that its input chooses.

    Raises:
        AdapterError: as `PromptTuning`, or the head is a language model's.
    """
    if head.kind == "lm":
        raise AdapterError(
            "attempt: a causal model trains on rows that hold the answer, which the mixture would read; use mpt, prompt or lora"
        )
    live: Any = PromptTuning(method.tokens).attach(model, head)
    encoder = live.inner.prompt_encoder[ADAPTER]
    width = encoder.embedding.weight.shape[1]
    shapes: dict[str, tuple[int, ...]] = {f"sources.{name}": (method.tokens, width) for name in method.sources}
    shapes |= {"down.weight": (method.dim, width), "up.weight": (width, method.dim), "norm.weight": (width,), "norm.bias": (width,)}
    own = _hang(live, "attempt", shapes)
    for name in method.sources:
        own[f"sources.{name}"].requires_grad_(False)
    asked: dict[str, Tensor | None] = {}
    embed = model.get_input_embeddings()  # type: ignore[operator]
    live.inner.register_forward_pre_hook(partial(_ask, asked), with_kwargs=True)
    sources = [own[f"sources.{name}"] for name in method.sources]
    live.inner.get_prompt = partial(_mixed, own, sources, method.temperature, (encoder.embedding.weight, partial(_pool, asked, embed)))
    return live  # type: ignore[no-any-return]


def mixture(target: Tensor, sources: Sequence[Tensor], wanted: Tensor, temperature: float) -> Tensor:
    """``P_t + sum_j a_j P_j``: prompts (P, D), ``wanted`` (B, D) -> (B, P, D)."""
    prompts = torch.stack([*sources, target])
    keys = prompts.amax(1)
    shares = (wanted @ keys.t() / (temperature * keys.shape[1] ** 0.5)).softmax(-1)
    return target + torch.einsum("bs,spd->bpd", shares, prompts)


def _hang(live: Any, kind: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    """Zeros of ``shapes`` beside peft's prompt, known as ``prompt_embeddings.<name>``."""
    mark, encoder = attached_to(live), live.inner.prompt_encoder[ADAPTER]
    mark.kind = kind
    device = encoder.embedding.weight.device
    made = {name: nn.Parameter(torch.zeros(shape, device=device)) for name, shape in shapes.items()}
    encoder.blend = nn.ParameterDict({name.replace(".", "__"): parameter for name, parameter in made.items()})
    mark.own |= {f"{PROMPT}.{name}": parameter for name, parameter in made.items()}
    return made


def _ask(asked: dict[str, Tensor | None], _module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    asked["ids"], asked["mask"] = inputs.get("input_ids"), inputs.get("attention_mask")


def _pool(asked: dict[str, Tensor | None], embed: nn.Module, rows: int) -> Tensor:
    """The largest value of each channel over a row's own tokens: (B, D)."""
    ids, mask = asked.get("ids"), asked.get("mask")
    if ids is None or len(ids) != rows:
        raise AdapterError(f"attempt: the mixture needs input_ids of {rows} rows; pass token ids")
    states: Tensor = embed(ids).float()
    return (states if mask is None else states.masked_fill(mask[..., None] == 0, float("-inf"))).amax(1)


def _mixed(
    own: dict[str, nn.Parameter],
    sources: Sequence[Tensor],
    temperature: float,
    parts: tuple[Tensor, Callable[[int], Tensor]],
    batch_size: int,
    **unused: Any,
) -> Tensor:
    """What peft asks for in place of its one prompt for all rows: (B, P, D)."""
    target, pool = parts
    inner = F.linear(F.silu(F.linear(pool(batch_size), own["down.weight"])), own["up.weight"])
    wanted = F.layer_norm(inner, inner.shape[-1:], own["norm.weight"], own["norm.bias"])
    return mixture(target, sources, wanted, temperature)
