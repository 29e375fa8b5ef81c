"""How rows of a causal model keep what they have read and go on from it; `paired` is the same for an encoder-decoder.

Shape suffixes: N rows of this forward, T tokens a row in this forward, W keys that the longest row reads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedpeft.serving.slots import Slots

Told = Sequence[tuple[int, Sequence[int]]]
"""Slots, ascending, and the next tokens of each."""


class Past(Protocol):
    """The state of all rows of a decoder, one slot a row."""

    def reset(self) -> None:
        """Forget all rows."""
        ...

    def take(self) -> int:
        """A new last slot."""
        ...

    def give_back(self, slot: int) -> int:
        """Free a slot, as `Slots.give_back`."""
        ...

    def apart(self, slots: Sequence[int]) -> list[list[int]]:
        """The places in ``slots`` of rows that one forward can feed."""
        ...

    def after(self, model: Any, rows: Told, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Logits (N, V) after the last token of each row."""
        ...

    def plain(self, model: Any, told: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """Logits (V,) after the last token of one row that was told all this, by the model itself."""
        ...


class Causal:
    """What rows of a causal model look back on."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self._slots = Slots()

    def take(self) -> int:
        """A new last slot."""
        return self._slots.take()

    def give_back(self, slot: int) -> int:
        """Free a slot, as `Slots.give_back`."""
        return self._slots.give_back(slot)

    def apart(self, slots: Sequence[int]) -> list[list[int]]:
        """All together."""
        return [list(range(len(slots)))]

    def after(self, model: Any, rows: Told, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Logits (N, V) after the last token of each row."""
        counts = [len(tokens) for _, tokens in rows]
        positions, seen = self._slots.aim([slot for slot, _ in rows], counts, device)
        keep, column = np.unique([count - 1 for count in counts], return_inverse=True)
        logits = model(
            input_ids=filled([tokens for _, tokens in rows]).to(device),
            attention_mask=additive(seen, dtype),
            position_ids=positions,
            past_key_values=self._slots,
            use_cache=True,
            logits_to_keep=torch.from_numpy(keep).to(device),
        ).logits  # (N, places that are some row's last, V)
        return last(logits, column.reshape(-1).tolist())

    def plain(self, model: Any, told: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """Logits (V,) after the last token of one row that was told all this, by the model itself."""
        ids = torch.tensor([[token for tokens in told for token in tokens]], device=device)
        found: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1]
        return found


def filled(rows: Sequence[Sequence[int]]) -> Tensor:
    """Ids (N, T) of rows of any length; nothing looks at what fills them up."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    return ids


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What every attention form takes: 0 where a key is seen, the least number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def last(logits: Tensor, places: list[int]) -> Tensor:
    """Each row's own place (N, V)."""
    return logits[torch.arange(len(places)), torch.tensor(places)]
