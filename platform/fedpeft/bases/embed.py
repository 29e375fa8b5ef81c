"""Embeddings of the bare base, of texts or images, for routing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.bases.base import Base
from fedpeft.errors import BaseError

BATCH_TOKENS = 4096  # padded tokens per forward; 16 texts of 256 tokens


def embed(base: Base, texts: Sequence[str]) -> NDArray[np.float32]:
    """Mean of the last hidden state over each text's tokens, L2-normalised: (N, D) float32, in the order given."""
    if base.device == "meta":
        raise BaseError(f"embed: base {base.spec.model} was built without weights; use load_base")
    if base.family == "vision":
        from fedpeft.bases.vision import embed_images

        with torch.no_grad(), evaluating(base.trunk):
            return embed_images(base, texts)
    rows = [tokens(base, text) for text in texts]
    out = np.zeros((len(rows), base.width), np.float32)
    with torch.no_grad(), evaluating(base.trunk):
        for batch in _batches(rows):
            out[batch] = _forward(base, [rows[index] for index in batch])
    return out


def tokens(base: Base, text: str) -> list[int]:
    """Token ids, never none: an empty text is a lone padding token."""
    ids = base.tokenizer(text, truncation=True, max_length=base.spec.max_tokens)["input_ids"]
    return list(ids) or [base.tokenizer.pad_token_id]


def _batches(rows: Sequence[list[int]]) -> Iterator[list[int]]:
    """Row numbers, longest first, so that little is padded and the first batch shows the largest memory."""
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index))
    while order:
        size = max(1, BATCH_TOKENS // len(rows[order[0]]))
        yield order[:size]
        order = order[size:]


def _forward(base: Base, rows: Sequence[list[int]]) -> NDArray[np.float32]:
    ids = torch.full((len(rows), max(map(len, rows))), base.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
    ids, mask = ids.to(base.device), mask.to(base.device)
    hidden = base.reader(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    mean = torch.einsum("ntd,nt->nd", hidden, mask.float()) / mask.sum(1, keepdim=True)
    result: NDArray[np.float32] = nn.functional.normalize(mean).cpu().numpy()
    return result


@contextmanager
def evaluating(trunk: nn.Module) -> Iterator[None]:
    """Inside, without dropout."""
    was = trunk.training
    trunk.eval()
    try:
        yield
    finally:
        trunk.train(was)
