"""A few fixed rows that any shell of a base answers, to compare two models by."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.bases.base import Base
from fedpeft.bases.spec import HeadSpec

FIRST = 5
"""Tokens below are special ones in most vocabularies, and left out."""


def trial(base: Base, head: HeadSpec, rows: int = 4, width: int = 24) -> dict[str, Tensor]:
    """What a shell of ``base`` with ``head`` is called with: random tokens (rows, width) of a fixed seed, without padding.

    A vision base gets random numbers for pixels. An encoder-decoder's rows end as its classifier wants them, and its decoder reads what
    its encoder reads.
    """
    if base.family == "vision":
        size = base.require_processor("trial").size
        return {"pixel_values": torch.randn(rows, 3, *size, generator=torch.Generator().manual_seed(0)).to(base.device)}
    drawn = torch.randint(FIRST, int(base.config.get_text_config().vocab_size), (rows, width), generator=torch.Generator().manual_seed(0))
    if base.family == "seq2seq" and isinstance(end := base.config.eos_token_id, int):
        drawn[drawn == end] = FIRST + (end == FIRST)
        drawn[:, -1] = end
    inputs = {"input_ids": drawn.to(base.device), "attention_mask": torch.ones_like(drawn).to(base.device)}
    return inputs | ({"decoder_input_ids": inputs["input_ids"]} if base.family == "seq2seq" and head.kind == "lm" else {})
