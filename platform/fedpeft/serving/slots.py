"""Keys and values of the running rows: one slot a row, rows of any length, written and read where they lie.

Shape suffixes: S slots, N rows of this forward, T tokens a row in this forward, W keys that the longest row reads, H heads, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

PAGE = 64
"""Slots grow in length by so many tokens, and in number by doubling."""


class Held(NamedTuple):
    """What one layer has: keys and values (N, H, W, D)."""

    keys: Tensor
    values: Tensor


class Slots(Cache):  # type: ignore[misc]
    """A transformers cache whose rows join and leave: `aim` says which rows the next forward feeds, `update` writes and reads them."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._room = (0, 0)
        self._where: slice | Tensor = slice(0)
        self._into: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self._from: tuple[Tensor, Tensor] | None = None
        self._width = 0

    def take(self) -> int:
        """A new last slot."""
        self.lengths.append(0)
        return len(self.lengths) - 1

    def give_back(self, slot: int) -> int:
        """Free ``slot``: the last slot moves there; returns the number that moved (``slot`` itself when it was the last)."""
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        if slot != last:
            self.lengths[slot] = length
            for buffer in (*self._keys, *self._values):
                buffer[slot, :, :length] = buffer[last, :, :length]
        return last

    def aim(self, slots: list[int], counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Prepare a forward that gives row n the next ``counts[n]`` tokens of ``slots[n]`` (ascending).

        Returns:
            Positions (N, T) and the additive mask's truth (N, 1, T, W): a token sees its own slot up to itself.
        """
        starts = torch.tensor([self.lengths[slot] for slot in slots])
        longest = max(counts)
        positions = starts[:, None] + torch.arange(longest)
        self._width = max(self.lengths[slot] + count for slot, count in zip(slots, counts, strict=True))
        self._room = (max(len(self.lengths), self._room[0]), max(self._width, self._room[1]))
        places = torch.tensor(slots)
        self._where = _where(slots, device)
        row, token = (torch.arange(longest) < torch.tensor(counts)[:, None]).nonzero(as_tuple=True)
        self._into = (places[row].to(device), positions[row, token].to(device))
        self._from = None if len(row) == len(slots) * longest else (row.to(device), token.to(device))
        for slot, count in zip(slots, counts, strict=True):
            self.lengths[slot] += count
        seen = torch.arange(self._width) <= positions[:, None, :, None]
        return positions.to(device), seen.to(device)

    def look(self, slots: list[int], device: torch.device) -> Tensor:
        """Prepare a forward that only reads what ``slots`` (ascending) hold, by `layers`; which keys are a row's own (N, W)."""
        self._width = max(self.lengths[slot] for slot in slots)
        where = _where(slots, device)
        pairs = zip(self._keys, self._values, strict=True)
        self.layers = [Held(keys[where, :, : self._width], values[where, :, : self._width]) for keys, values in pairs]
        return self.own(slots, device)

    def own(self, slots: list[int], device: torch.device) -> Tensor:
        """Which of the keys that the next forward reads are a row's own (N, W)."""
        lengths = torch.tensor([self.lengths[slot] for slot in slots])
        return (torch.arange(self._width) < lengths[:, None]).to(device)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_settings: Any) -> tuple[Tensor, Tensor]:
        """Write this forward's keys and values (N, H, T, D); give those of its rows so far (N, H, W, D)."""
        if layer_idx == len(self._keys):
            self._keys.append(key_states.new_zeros(0, key_states.shape[1], 0, key_states.shape[3]))
            self._values.append(value_states.new_zeros(0, value_states.shape[1], 0, value_states.shape[3]))
        return self._write(self._keys, layer_idx, key_states), self._write(self._values, layer_idx, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row; positions and mask are always given, so that nothing depends on it."""
        return self._width

    def _write(self, buffers: list[Tensor], layer: int, states: Tensor) -> Tensor:
        buffer = buffers[layer] = _grown(buffers[layer], self._room)
        tokens = states.transpose(1, 2)  # (N, T, H, D)
        buffer[self._into[0], :, self._into[1]] = tokens[self._from] if self._from else tokens.flatten(0, 1)
        return buffer[self._where, :, : self._width]


def _where(slots: list[int], device: torch.device) -> slice | Tensor:
    """Slots that lie side by side are a view, others are gathered."""
    whole = slots[-1] - slots[0] + 1 == len(slots)
    return slice(slots[0], slots[-1] + 1) if whole else torch.tensor(slots, device=device)


def _grown(buffer: Tensor, room: tuple[int, int]) -> Tensor:
    slots, width = buffer.shape[0], buffer.shape[2]
    if slots >= room[0] and width >= room[1]:
        return buffer
    slots = slots if slots >= room[0] else max(room[0], 2 * slots)
    width = width if width >= room[1] else -(-room[1] // PAGE) * PAGE
    new = buffer.new_zeros(slots, buffer.shape[1], width, buffer.shape[3])
    new[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return new
