"""Compute the frozen bottom of an encoder once per row: what training repeats is the layers that carry an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedpeft.bases import Base
from fedpeft.tasks import Encoded

Key = tuple[int, ...]


class Bottom(nn.Module):
    """Stands for a BERT trunk's embeddings and its lowest layers; the output for a row does not depend on the batch around it.

    The layers are kept out of the module tree, so that a method finds only those above.
    """

    def __init__(self, embeddings: nn.Module, layers: Sequence[nn.Module], pad: int) -> None:
        super().__init__()
        self._parts = (embeddings, tuple(layers))
        self._pad = pad
        self._known: dict[Key, torch.Tensor] = {}

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        """Hidden states (B, T, D) of ``input_ids`` (B, T), zero where the row is padded."""
        keys = [tuple(token for token in row if token != self._pad) for row in input_ids.tolist()]
        self.learn(keys)
        rows = [self._known[key] for key in keys]
        out = rows[0].new_zeros(len(rows), input_ids.shape[1], rows[0].shape[-1])
        for place, row in enumerate(rows):
            out[place, : len(row)] = row
        return out

    def learn(self, keys: Sequence[Key]) -> None:
        """Compute what is not yet known, rows of one length together, so that none is padded."""
        by_length: dict[int, list[Key]] = {}
        for key in dict.fromkeys(keys):
            if key not in self._known:
                by_length.setdefault(len(key), []).append(key)
        for missing in by_length.values():
            for start in range(0, len(missing), 32):
                part = missing[start : start + 32]
                self._known.update(zip(part, self._compute(torch.tensor(part)), strict=True))

    def _compute(self, ids: torch.Tensor) -> torch.Tensor:
        embeddings, layers = self._parts
        with torch.no_grad():
            hidden = embeddings(input_ids=ids)
            for layer in layers:
                hidden = layer(hidden)
        return hidden  # type: ignore[no-any-return]


def make_shallow(base: Base, layers: int) -> None:
    """Leave the top ``layers`` of the BERT ``base`` as its trunk's layers; all below becomes a `Bottom`."""
    trunk: Any = base.trunk
    count = len(trunk.encoder.layer) - layers
    trunk.embeddings = Bottom(trunk.embeddings, list(trunk.encoder.layer[:count]), int(base.tokenizer.pad_token_id))
    trunk.encoder.layer = trunk.encoder.layer[count:]


def warm(base: Base, data: Encoded) -> None:
    """Compute the bottom for all rows of ``data`` now."""
    trunk: Any = base.trunk
    if isinstance(trunk.embeddings, Bottom):
        trunk.embeddings.learn([tuple(ids.tolist()) for ids in data.ids])
