"""Sequences of different lengths as the rows of one tensor, and images as another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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


def inputs_of(ids: Sequence[NDArray[Any]], pad: int) -> dict[str, torch.Tensor]:
    """What a classifier is called with for ``ids``: token sequences as `padded` has them, or ``pixel_values`` (S, 3, H, W) of images."""
    if ids[0].ndim == 3:
        return {"pixel_values": torch.from_numpy(np.stack(ids))}
    return padded([torch.from_numpy(sequence).long() for sequence in ids], pad)


def filled(sequences: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    """Sequences (S, T), filled up with ``value`` at the end."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=value)
