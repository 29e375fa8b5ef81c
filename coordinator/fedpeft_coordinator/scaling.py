"""Rings of narrow codes over rounds: which a round takes, and its public scales from the last mean of the same tensors.

All of it is fixed when a round is planned and lies in the journal (the shifts in the store), so that a coordinator that is started
again sends the same plan and opens the same sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedpeft import config
from fedpeft.config import describe
from fedpeft.errors import ConfigError, UpdateError
from fedpeft.privacy.settings import Client
from fedpeft.tensors import Flat, Layout, Tensors
from fedpeft.wire.codecs import Lanes, Ring
from fedpeft_coordinator import planning
from fedpeft_coordinator.setup import Setup
from fedpeft_coordinator.state import Round, TaskRound
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.updates import sent_layout, up_layout

SHIFTS = "shifts"
FIRST = 8
"""Bits at least, unless a budget says otherwise, while no mean is known."""


@dataclass(frozen=True)
class Scaling:
    """The scales of ``setup``'s rounds, kept in ``store``."""

    setup: Setup
    store: Store

    def planned(self, plan: Round) -> Round:
        """``plan`` with rings and scales where codes are to be narrow; a task that no ring fits is skipped by name."""
        return replace(plan, tasks={name: self._planned(row) if name in plan.asked else row for name, row in plan.tasks.items()})

    def shifts(self, row: TaskRound) -> bytes:
        """The scales of ``row`` as its plan tells them."""
        return self.store.arrays(row.scales)[SHIFTS].tobytes() if row.ring else b""

    def lanes(self, row: TaskRound) -> Lanes | None:
        """How the codes of ``row`` travel; None where all have 32 bits."""
        if row.privacy:
            return Lanes.of_grid(sent_layout(self.setup, row), planning.grid_of(row, self.setup.limits))
        if row.ring is None:
            return None
        ring = config.build({"ring": Ring}, dict(row.ring), "journal")
        up, grid = up_layout(self.setup, row), planning.grid_of(row, self.setup.limits)
        return Lanes.told(up, row.roles, ring, self.shifts(row), grid)

    def learned(self, row: TaskRound, mean: str) -> Mapping[str, str]:
        """The last means once ``row`` has ``mean``, a digest in the store; nothing is remembered where no ring needs it."""
        return {**row.means, up_layout(self.setup, row).fingerprint: mean} if row.ring is not None else row.means

    def _planned(self, row: TaskRound) -> TaskRound:
        if isinstance(self.setup.privacy, Client):
            return row  # delta and noise share one grid, whose bits the mechanism says
        up, grid = up_layout(self.setup, row), planning.grid_of(row, self.setup.limits)
        narrow, mean = up.subset(row.roles), self._mean(row, up)
        try:
            ring = planning.ring_of(self.setup, narrow.size, up.size, grid.sites)
            if ring is None:
                return row
            if mean is None:
                ring, mean = self._first(ring), self._guess(row, narrow, ring)
            shifts = ring.shifts(mean, grid)
        except (ConfigError, UpdateError) as fault:
            return planning.skipped(row, str(fault))
        return replace(row, ring=describe(ring), scales=self.store.put_arrays({SHIFTS: shifts}))

    def _mean(self, row: TaskRound, up: Layout) -> Flat | None:
        """The last mean of what travels, or None where there was none that moved anything."""
        known = row.means.get(up.fingerprint)
        mean = self.store.tensors(known, up).pick(row.roles).flat if known else None
        return mean if mean is not None and mean.any() else None

    def _first(self, ring: Ring) -> Ring:
        """The ring of a round whose scales are a guess: what is far below it must not be rounded away."""
        return ring if self.setup.limits.budget else replace(ring, bits=max(ring.bits, FIRST))

    def _guess(self, row: TaskRound, narrow: Layout, ring: Ring) -> Flat:
        """What training can move a value by, at most about: the ring then reaches to it and no further."""
        travel, reach = self.setup.tasks[row.task].travel, self.setup.limits.reach
        guess = Tensors.zeros(narrow).flat
        for role, span in narrow.role_spans.items():
            guess[span] = np.float32(min(travel(role) or reach, reach) / ring.headroom)
        return guess
