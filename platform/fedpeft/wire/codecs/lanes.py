"""Which codes of a vector travel in how many bits: those of some roles in a ring on public scales, all others in 32.

What a scheme sends beside its roles (masses, probes, controls), the weight and the counters stay in wide lanes. Sums are taken in
the ring as they come, masked or not; nothing is dequantised before.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import ceil, log2

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.tensors import Layout, Tensors
from fedpeft.update import WORD, Grid, Update
from fedpeft.wire.codecs.ring import Codes, Ring, Shifts, pack, packed_size, settle, unpack

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Lanes:
    """The lanes of a vector that begins with the codes of ``layout``: ``roles`` in the ring of ``sites`` sites, the rest wide.

    ``shifts``, uint8 (blocks,), are the scales of the codes of ``roles`` in storage order (see `Ring`).
    """

    layout: Layout
    roles: frozenset[str]
    ring: Ring
    shifts: Shifts
    sites: int

    @staticmethod
    def told(layout: Layout, roles: Collection[str], ring: Ring, scales: bytes, grid: Grid) -> Lanes:
        """The lanes of a plan. Raises `UpdateError` when ``scales`` are of another number of blocks, or their sums leave ``grid``."""
        lanes = Lanes(layout, frozenset(roles) & layout.roles, ring, np.frombuffer(scales, np.uint8), grid.sites)
        blocks, largest = -(-lanes.size // ring.block), ring.largest(grid)
        if lanes.shifts.size != blocks or int(lanes.shifts.max(initial=0)) > largest:
            raise UpdateError(
                f"ring: {lanes.shifts.size} scales up to {lanes.shifts.max(initial=0)}, {lanes.size} values of {ring.bits} bits need "
                f"{blocks} up to {largest}; do both sides run one version?"
            )
        return lanes

    @staticmethod
    def of_grid(layout: Layout, grid: Grid) -> Lanes | None:
        """The lanes of codes that are integers of a narrow ``grid`` as they are, as under noise; None where it has all 32 bits."""
        if grid.bits == WORD:
            return None
        ring = Ring(grid.bits - ceil(log2(grid.sites)))
        return Lanes(layout, layout.roles, ring, np.zeros(-(-layout.size // ring.block), np.uint8), grid.sites)

    @property
    def alone(self) -> Lanes:
        """The lanes of one site's own vector, which needs no room for a sum."""
        return replace(self, sites=1)

    @property
    def size(self) -> int:
        """Values in the ring."""
        return sum(span.stop - span.start for span in self._spans)

    @property
    def width(self) -> int:
        """Bits of one of them."""
        return self.ring.width(self.sites)

    def bytes(self, extra: int = 0) -> int:
        """Bytes of a vector with ``extra`` codes behind the layout's."""
        return packed_size(self.size, self.width) + 4 * (self.layout.size - self.size + extra)

    def send(self, update: Update, seed: int | None) -> tuple[Update, Tensors]:
        """``update`` of one site (its residual in it) on the public scales, and what of its delta that leaves out.

        The first is of the same grid, so it adds as any other. Rounds to nearest without a seed, else unbiased but where it is cut.
        """
        narrow, wide = self._parts(update.codes)
        codes = self._whole(self.ring.widen(self.ring.narrow(narrow, self.shifts, seed), self.shifts), wide)
        lost = (update.codes.astype(np.float64) - codes) * (update.grid.step / update.weight)
        return replace(update, codes=codes), Tensors(update.layout, lost.astype(np.float32))

    def shrink(self, vector: Codes) -> Codes:
        """A vector whose codes `send` has rounded, those of the ring as its integers."""
        narrow, wide = self._parts(vector)
        return self._whole(self.ring.narrow(narrow, self.shifts, None), wide)

    def grow(self, total: Codes, count: int) -> Codes:
        """A sum of ``count`` vectors of `shrink`, modulo 2^32, as codes of the round's grid. Raises `UpdateError` when it is none."""
        narrow, wide = self._parts(total)
        narrow = settle(narrow, self.width)
        if int(np.abs(narrow).max(initial=0)) > count * self.ring.limit:
            raise UpdateError(f"ring: a sum of {count} site(s) holds {np.abs(narrow).max()}, each may send {self.ring.limit} at most")
        return self._whole(self.ring.widen(narrow, self.shifts), wide)

    def write(self, vector: Codes) -> Bytes:
        """The low bits of a vector as they travel."""
        narrow, wide = self._parts(vector)
        return np.frombuffer(pack(narrow, self.width) + pack(wide, WORD), np.uint8)

    def read(self, values: Bytes, extra: int = 0) -> Codes:
        """Inverse of `write`, as far as the bits go, of a vector with ``extra`` codes behind the layout's.

        Raises:
            UpdateError: ``values`` are of another type or number.
        """
        if values.dtype != np.uint8 or values.size != self.bytes(extra):
            raise UpdateError(
                f"ring: {values.size} values of {values.dtype}, {self.bytes(extra)} bytes were expected; do both sides run one version?"
            )
        cut = packed_size(self.size, self.width)
        narrow = unpack(values[:cut].data, self.width, self.size)
        return self._whole(narrow, unpack(values[cut:].data, WORD, self.layout.size - self.size + extra))

    @cached_property
    def _spans(self) -> list[slice]:
        return [span for role, span in self.layout.role_spans.items() if role in self.roles]

    @cached_property
    def _gaps(self) -> list[slice]:
        """What of the layout is wide."""
        edges = [0, *(edge for span in self._spans for edge in (span.start, span.stop)), self.layout.size]
        return [slice(start, stop) for start, stop in list(pairwise(edges))[::2] if start < stop]

    def _parts(self, vector: Codes) -> tuple[Codes, Codes]:
        """The codes of the ring, and the others, of a vector at least as long as the layout."""
        others = [vector[span] for span in (*self._gaps, slice(self.layout.size, None))]
        narrow = [vector[span] for span in self._spans]
        return np.concatenate(narrow) if narrow else vector[:0], np.concatenate(others)

    def _whole(self, narrow: Codes, wide: Codes) -> Codes:
        """Inverse of `_parts`."""
        vector, at, rest = np.empty(narrow.size + wide.size, np.int32), 0, 0
        for span in self._spans:
            vector[span] = narrow[at : at + span.stop - span.start]
            at += span.stop - span.start
        for span in (*self._gaps, slice(self.layout.size, vector.size)):
            vector[span] = wide[rest : rest + span.stop - span.start]
            rest += span.stop - span.start
        return vector
