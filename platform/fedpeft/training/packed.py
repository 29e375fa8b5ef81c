"""Attention inside each sequence of a packed row, instead of over the row under a mask: its cost is the sum of squares, not the square.

transformers tells packed sequences apart by positions that restart at 0 and masks the whole row (N, N). On a CPU that was a fifth of a
training step with 8 instructions in a row. On other devices, and for anything but plain causal attention, transformers' own runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "fedpeft_packed"
CALL_COST = 1 << 18
"""What one more call of attention costs, as so many multiplied pairs of tokens times hidden size."""
SPECIAL = ("sliding_window", "softcap", "s_aux", "position_bias", "cache", "is_causal")
"""Settings under which a sequence alone is not what it is in its row, or that this function does not know."""


@contextmanager
def by_sequence(model: nn.Module) -> Iterator[None]:
    """Let models that use sdpa attend inside sequences; their own setting is back at the end."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    found = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    configs = {id(module.config): module.config for module in found if module.config._attn_implementation == "sdpa"}
    for config in configs.values():
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in configs.values():
            config._attn_implementation = "sdpa"


def attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **settings: Any
) -> tuple[torch.Tensor, None]:
    """Query (B, heads, T, D) -> (B, T, heads, D), as ``sdpa_attention_forward``."""
    lengths = sequence_lengths(module, query, key, settings)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)  # type: ignore[no-any-return]
    parts = zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **settings)[0] for part in parts], 1), None


def sequence_lengths(module: nn.Module, query: torch.Tensor, key: torch.Tensor, settings: dict[str, Any]) -> list[int] | None:
    """Lengths of the sequences in the row; None where the row is one sequence, special, or too small to gain."""
    positions = settings.get("position_ids")
    if positions is None or query.device.type != "cpu" or query.shape[0] != 1 or positions.shape != (1, key.shape[2]):
        return None
    if query.shape[2] != key.shape[2] or not getattr(module, "is_causal", False) or any(settings.get(name) is not None for name in SPECIAL):
        return None
    starts = (positions[0] == 0).nonzero()[:, 0].tolist()
    lengths = [after - before for before, after in zip(starts, [*starts[1:], query.shape[2]], strict=True)]
    pairs = query.shape[2] ** 2 - sum(length**2 for length in lengths)
    worth = pairs * query.shape[1] * query.shape[3] > CALL_COST * len(lengths)
    return lengths if starts[:1] == [0] and worth else None
