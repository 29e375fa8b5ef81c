"""Attention inside each sequence of a packed row, instead of over the row under a mask: its cost is the sum of squares, not the square.

transformers tells packed sequences apart by positions that restart at 0 and masks the whole row (N, N). On a CPU that was a fifth of a
training step with 8 instructions in a row; there each sequence is a call of its own. On CUDA one call of flash attention takes them all, in
half precision. On other devices, and for anything but plain causal attention, transformers' own runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
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
    if query.is_cuda:
        return _varlen(query, key, value, lengths, settings.get("scaling")), None
    parts = zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **settings)[0] for part in parts], 1), None


def sequence_lengths(module: nn.Module, query: torch.Tensor, key: torch.Tensor, settings: dict[str, Any]) -> list[int] | None:
    """Lengths of the sequences in the row; None where the row is one sequence, special, or too small to gain."""
    positions = settings.get("position_ids")
    if positions is None or query.shape[0] != 1 or positions.shape != (1, key.shape[2]) or query.shape[2] != key.shape[2]:
        return None
    if not getattr(module, "is_causal", False) or any(settings.get(name) is not None for name in SPECIAL):
        return None
    if query.device.type != "cpu" and not (query.is_cuda and _flash(query) and not settings.get("dropout")):
        return None
    lengths = _rows.lengths(positions)
    if query.is_cuda:
        return lengths if len(lengths) > 1 else None
    pairs = query.shape[2] ** 2 - sum(length**2 for length in lengths)
    worth = pairs * query.shape[1] * query.shape[3] > CALL_COST * len(lengths)
    return lengths if lengths and worth else None


class _Rows:
    """The lengths of the last row that was asked about: every layer asks about the same one, and to read them waits for the device."""

    def __init__(self) -> None:
        self._positions: torch.Tensor | None = None
        self._lengths: list[int] = []

    def lengths(self, positions: torch.Tensor) -> list[int]:
        """Lengths by ``positions`` (1, N) that restart at 0; none when the first is not 0."""
        if self._positions is not positions:
            starts = (positions[0] == 0).nonzero()[:, 0].tolist()
            ends = [*starts[1:], positions.shape[1]]
            found = [after - before for before, after in zip(starts, ends, strict=True)]
            self._positions, self._lengths = positions, found if starts[:1] == [0] else []
        return self._lengths


_rows = _Rows()


def _flash(query: torch.Tensor) -> bool:
    """Whether flash attention takes rows of ``query`` on its device."""
    half, fits = query.dtype in (torch.bfloat16, torch.float16), query.shape[3] <= 256
    return half and fits and _varlen_settings() is not None and torch.cuda.get_device_capability(query.device) >= (8, 0)


@cache
def _varlen_settings() -> frozenset[str] | None:
    """What torch's attention over rows of sequences can be told; None before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float | None) -> torch.Tensor:
    """Causal attention inside each sequence: (1, heads, T, D) -> (1, T, heads, D)."""
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_settings() or frozenset()
    named: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in known:
        named["enable_gqa"] = True
    elif groups > 1:
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    if scale is not None and "scale" in known:
        named["scale"] = scale
    elif scale is not None:
        query = query * (scale * query.shape[3] ** 0.5)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(query.device, torch.int32, non_blocking=True)
    rows: list[torch.Tensor] = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    call: Callable[..., Any] = varlen_attn
    return call(*rows, ends, ends, max(lengths), max(lengths), **named)[None]  # type: ignore[no-any-return]
