"""One forward for rows of any length and any mixture of adapters: the model's side of continuous batching.

Shape suffixes: N rows of this forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.bases.spec import rounding
from fedpeft.errors import BaseError
from fedpeft.serving.bank import Bank, gates
from fedpeft.serving.paired import Paired
from fedpeft.serving.pasts import Causal, Past
from fedpeft.serving.requests import Mixture

if TYPE_CHECKING:
    from fedpeft.bases import Base

Logits = NDArray[np.float32]
TRIAL: tuple[dict[int, list[int]], ...] = ({0: [3, 5, 7, 4], 1: [8]}, {0: [6]}, {0: [7], 1: [9]})
"""What `Decoder.probe` gives two rows, forward by forward."""


@dataclass(eq=False)
class Seat:
    """A running row: where its keys and values lie, and what adapts it."""

    slot: int
    mixture: Mixture


class Decoder:
    """Rows that join, go on and leave, over one model with a bank of adapters."""

    def __init__(self, base: Base, bank: Bank) -> None:
        self._base, self._bank = base, bank
        self.whole = base.family == "seq2seq"
        self._past: Past = Paired(base) if self.whole else Causal()
        self._seats: list[Seat] = []
        self._device = torch.device(base.device)
        self._dtype = torch.float32

    def open(self, mixture: Mixture) -> Seat:
        """A place for a new row."""
        seat = Seat(self._past.take(), mixture)
        self._seats.append(seat)
        return seat

    def close(self, seat: Seat) -> None:
        """Free the place of a row; the last row's keys and values move there."""
        moved = self._past.give_back(seat.slot)
        last = self._seats.pop()
        if moved != seat.slot:
            last.slot = seat.slot
            self._seats[seat.slot] = last

    def reset(self) -> None:
        """Forget all rows."""
        self._past.reset()
        self._seats = []

    @torch.no_grad()
    def forward(self, work: Sequence[tuple[Seat, Sequence[int]]]) -> Logits:
        """Give each row its next tokens: float32 logits (N, V) after the last of each, in the order of ``work``."""
        order = sorted(range(len(work)), key=lambda place: work[place][0].slot)
        parts = [[order[place] for place in part] for part in self._past.apart([work[place][0].slot for place in order])]
        found = np.concatenate([self._part([work[place] for place in part]) for part in parts])
        return found[np.argsort([place for part in parts for place in part])]

    def _part(self, rows: list[tuple[Seat, Sequence[int]]]) -> Logits:
        self._bank.use(gates([seat.mixture for seat, _ in rows]))
        logits = self._past.after(self._bank.model, [(seat.slot, tokens) for seat, tokens in rows], self._dtype, self._device)
        if logits.dtype != self._dtype and logits.dtype.is_floating_point:
            self._dtype = logits.dtype
        found: Logits = logits.float().cpu().numpy()
        return found

    def probe(self) -> None:
        """Compare two ragged cached rows with plain forwards of the base.

        Raises:
            BaseError: this architecture does not keep its past as keys and values alone, or has other positions or masks.
        """
        try:
            got = self._probed()
            wanted = self._plain()
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError) as fault:
            raise self._unsuited(f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}") from None
        finally:
            self.reset()
        off = float(np.abs(got - wanted).max()) / max(float(np.abs(wanted).max()), 1e-6)
        if not off <= rounding(self._base.spec.quantization):
            raise self._unsuited(f"its logits with a cache are {off:.1e} off")

    def _probed(self) -> Logits:
        seats = [self.open({}) for _ in TRIAL[0]]
        return [self.forward([(seats[row], tokens) for row, tokens in told.items()]) for told in TRIAL][-1]

    @torch.no_grad()
    def _plain(self) -> Logits:
        self._bank.use(gates([{}]))
        rows = [[told[row] for told in TRIAL if row in told] for row in TRIAL[0]]
        return np.stack([self._past.plain(self._bank.model, told, self._device).float().cpu().numpy() for told in rows])

    def _unsuited(self, cause: str) -> BaseError:
        name = type(self._base.model).__name__
        return BaseError(
            f"base {self._base.spec.model}: {name} cannot be served in batches ({cause}); serve another base, or export its adapters"
        )
