"""One forward for rows of any length and any mixture of adapters: the model's side of continuous batching.

Shape suffixes: N rows of this forward, T tokens a row in this forward, U places whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.bases.spec import rounding
from fedpeft.errors import BaseError
from fedpeft.serving.bank import Bank, gates
from fedpeft.serving.requests import Mixture
from fedpeft.serving.slots import Slots

if TYPE_CHECKING:
    from fedpeft.bases import Base


@dataclass(eq=False)
class Seat:
    """A running row: where its keys and values lie, and what adapts it."""

    slot: int
    mixture: Mixture


class Decoder:
    """Rows that join, go on and leave, over one model with a bank of adapters."""

    def __init__(self, base: Base, bank: Bank) -> None:
        self._base, self._bank = base, bank
        self._slots = Slots()
        self._seats: list[Seat] = []
        self._device = torch.device(base.device)
        self._dtype = torch.float32

    def open(self, mixture: Mixture) -> Seat:
        """A place for a new row."""
        seat = Seat(self._slots.take(), mixture)
        self._seats.append(seat)
        return seat

    def close(self, seat: Seat) -> None:
        """Free the place of a row; the last row's keys and values move there."""
        moved = self._slots.give_back(seat.slot)
        last = self._seats.pop()
        if moved != seat.slot:
            last.slot = seat.slot
            self._seats[seat.slot] = last

    def reset(self) -> None:
        """Forget all rows."""
        self._slots, self._seats = Slots(), []

    @torch.no_grad()
    def forward(self, work: Sequence[tuple[Seat, Sequence[int]]]) -> NDArray[np.float32]:
        """Give each row its next tokens: float32 logits (N, V) after the last of each, in the order of ``work``."""
        order = sorted(range(len(work)), key=lambda place: work[place][0].slot)
        rows = [work[place] for place in order]
        counts = [len(tokens) for _, tokens in rows]
        positions, seen = self._slots.aim([seat.slot for seat, _ in rows], counts, self._device)
        keep, column = np.unique([count - 1 for count in counts], return_inverse=True)
        self._bank.use(gates([seat.mixture for seat, _ in rows]))
        logits = self._bank.model(
            input_ids=_padded([tokens for _, tokens in rows]).to(self._device),
            attention_mask=_additive(seen, self._dtype),
            position_ids=positions,
            past_key_values=self._slots,
            use_cache=True,
            logits_to_keep=torch.from_numpy(keep).to(self._device),
        ).logits  # (N, U, V)
        if logits.dtype != self._dtype and logits.dtype.is_floating_point:
            self._dtype = logits.dtype
        last: NDArray[np.float32] = logits[torch.arange(len(rows)), torch.from_numpy(column.reshape(-1))].float().cpu().numpy()
        return last[np.argsort(order)]

    def probe(self) -> None:
        """Compare two ragged cached rows with plain forwards of the base.

        Raises:
            BaseError: this architecture does not keep its past as keys and values alone, or has other positions or masks.
        """
        rows = [[3, 5, 7, 4, 6], [8, 9]]
        try:
            got = self._probed(rows)
            wanted = self._plain(rows)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError) as fault:
            raise self._unsuited(f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}") from None
        finally:
            self.reset()
        off = float(np.abs(got - wanted).max()) / max(float(np.abs(wanted).max()), 1e-6)
        if not off <= rounding(self._base.spec.quantization):
            raise self._unsuited(f"its logits with a cache are {off:.1e} off")

    def _probed(self, rows: list[list[int]]) -> NDArray[np.float32]:
        seats = [self.open({}) for _ in rows]
        self.forward([(seat, row[:-1]) for seat, row in zip(seats, rows, strict=True)])
        return self.forward([(seat, row[-1:]) for seat, row in zip(seats, rows, strict=True)])

    @torch.no_grad()
    def _plain(self, rows: list[list[int]]) -> NDArray[np.float32]:
        self._bank.use(gates([{}]))
        ids = [torch.tensor([row], device=self._device) for row in rows]
        return np.stack([self._bank.model(input_ids=row, use_cache=False).logits[0, -1].float().cpu().numpy() for row in ids])

    def _unsuited(self, cause: str) -> BaseError:
        name = type(self._base.model).__name__
        return BaseError(
            f"base {self._base.spec.model}: {name} cannot be served in batches ({cause}); serve another base, or export its adapters"
        )


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    return ids


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What every attention form takes: 0 where a key is seen, the least number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
