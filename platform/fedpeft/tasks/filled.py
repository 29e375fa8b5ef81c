"""Sequences of different lengths as the rows of one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

IGNORED = -100
"""The label where none is."""


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def padded(sequences: Sequence[torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` (S, T) of sequences filled up at the end."""
    ids = filled(sequences, pad)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()}


def filled(sequences: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    """Sequences (S, T), filled up with ``value`` at the end."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=value)
