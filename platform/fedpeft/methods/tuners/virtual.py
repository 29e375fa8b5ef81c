"""The live half of the tuners that add virtual tokens: peft's prompt model inside `Prompted`, called as the shell is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedpeft.errors import AdapterError
from fedpeft.methods.attached import ADAPTER
from fedpeft.methods.prompted import OTHERS, prompted, require_cache
from fedpeft.methods.targets import token_table
from fedpeft.methods.tuners.live import seeded
from fedpeft.methods.tuners.row import Row

if TYPE_CHECKING:
    from fedpeft.bases.spec import HeadSpec


def put_before(model: nn.Module, head: HeadSpec, kind: str, row: Row, arguments: dict[str, Any]) -> nn.Module:
    """Return a module around ``model`` that puts the virtual tokens of ``row`` before its input, or into its cache.

    Raises:
        AdapterError: an encoder-decoder, a model of images, a classifier that pools the last token, or a trunk that takes no cache.
    """
    if row.place == "cache":
        require_cache(model)
        return prompted(model, _config(row.peft, arguments), kind, head)
    if head.kind == "classification" and hasattr(model, "score"):
        raise AdapterError(
            f"{kind}: {type(model).__name__} classifies by the last token, which peft cannot find behind a prompt in a padded batch; "
            f"use prefix, or {OTHERS}"
        )
    width = int(token_table(model, kind).weight.shape[1])
    if row.peft == "CPT":
        tokens = len(arguments["cpt_token_ids"])
        plain = _config("PROMPT_TUNING", _sizes(width) | {"num_virtual_tokens": tokens})
        return prompted(model, plain, kind, head, partial(_in_context, arguments=arguments, width=width))
    return prompted(model, _config(row.peft, arguments | _sizes(width)), kind, head, _answer_one_task)


def _config(kind: str, arguments: dict[str, Any]) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**arguments)


def _sizes(width: int) -> dict[str, int]:
    """Sizes that peft would else look for under names that not every config has."""
    return {"token_dim": width, "num_layers": 1, "num_attention_heads": 1}


def _answer_one_task(inner: Any) -> None:
    """Every row is of task 0 for an encoder that asks: an adapter of ours belongs to one task."""

    def first(encoder: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        indices, *rest = inputs
        return (indices, torch.zeros(len(indices), dtype=torch.long, device=indices.device)) if rest else inputs

    inner.prompt_encoder[ADAPTER].register_forward_pre_hook(first)


def _in_context(inner: Any, arguments: dict[str, Any], width: int) -> None:
    """Put CPT's encoder in the place of a plain prompt's: peft's own CPT model loses its adapter unless it is named default."""
    from peft import CPTEmbedding

    config = _config("CPT", arguments | {"task_type": "CAUSAL_LM"})
    config.token_dim = width
    with seeded():
        encoder = CPTEmbedding(config, inner.word_embeddings)
    encoder.forward = partial(_projected, encoder)
    inner.prompt_encoder[ADAPTER] = encoder.to(inner.word_embeddings.weight.device)


def _projected(encoder: Any, indices: Tensor) -> Tensor:
    """Token embeddings plus a delta of bounded norm (..., D); the projection is written in place, so that the delta stays a view."""
    with torch.no_grad():
        encoder.delta_embedding.weight.copy_(encoder.get_projection())
    out: Tensor = encoder.embedding(indices) + encoder.delta_embedding(indices)
    return out
