"""What a site keeps of a task for itself, by the task's own round: private tensors, SCAFFOLD control, a codec's residual.

A round goes on from the last one whose contribution the coordinator counted, which the plan names: an answer that was late or
refused, or a round that was planned again, leaves no trace in what the site keeps, as it left none in the federation. What a
round made is written before its answer, so a worker that dies in between does the round again from the same values and
gives the same answer.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from safetensors.numpy import load, save

from fedpeft.schemes import Phase
from fedpeft.tensors import Flat, Layout, Tensors
from fedpeft_client.store import Store

PRIVATE, CONTROL, RESIDUAL = "private/", "control/", "residual/"
NEWEST = ("", "newest")
"""Stands where a run is named; no federation has an empty name."""


@dataclass(frozen=True)
class Own:
    """Values by kind and role: ``private/ROLE`` tensors, the ``control/ROLE`` of gradients, a codec's ``residual/ROLE``."""

    values: Mapping[str, Flat] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over names and values; empty when there are none."""
        hasher = hashlib.sha256()
        for name, values in sorted(self.values.items()):
            hasher.update(f"{name}\0{values.size}\0".encode() + values.astype("<f4", copy=False).tobytes())
        return hasher.hexdigest() if self.values else ""

    def patch(self, start: Tensors, phase: Phase) -> Tensors:
        """``start`` with the site's private roles in place, but for those that ``phase`` moves for all."""
        mine = start.layout.subset({role for role in start.layout.roles - phase.moves if PRIVATE + role in self.values})
        return start.patch(self._tensors(mine, PRIVATE))

    def control(self, layout: Layout) -> Tensors:
        """The site's control of ``layout``: zeros where it has none yet."""
        return Tensors.zeros(layout).patch(self._tensors(layout.subset({r for r in layout.roles if CONTROL + r in self.values}), CONTROL))

    def residual(self, layout: Layout) -> Tensors:
        """What a codec kept back of ``layout``: zeros where nothing is kept."""
        return Tensors.zeros(layout).patch(self._tensors(layout.subset({r for r in layout.roles if RESIDUAL + r in self.values}), RESIDUAL))

    def with_residual(self, residual: Tensors) -> Own:
        """With what a codec kept back of the roles that travelled."""
        return Own({**self.values, **_named(residual, RESIDUAL)})

    def private(self, layout: Layout) -> Tensors | None:
        """The kept private tensors of ``layout``; None where a role is missing or of another size."""
        spans = layout.role_spans
        if any(PRIVATE + role not in self.values or self.values[PRIVATE + role].size != s.stop - s.start for role, s in spans.items()):
            return None
        return self._tensors(layout, PRIVATE)

    def after(self, private: Tensors, control: Tensors | None) -> Own:
        """With what a round left behind: ``private`` of the private roles, ``control`` of the roles that moved."""
        return Own({**self.values, **_named(private, PRIVATE), **({} if control is None else _named(control, CONTROL))})

    def _tensors(self, layout: Layout, kind: str) -> Tensors:
        parts = [self.values[kind + role] for role in sorted(layout.roles)]
        return Tensors(layout, np.concatenate([np.zeros(0, np.float32), *parts]))


@dataclass(frozen=True)
class Personal:
    """What is kept of every task of a run, in ``store``: two rounds, and the newest of all. A run is named by federation and run id."""

    store: Store

    def at(self, run: tuple[str, str], task: str, number: int) -> Own:
        """As it was after the task's round ``number``, or after the last one before that."""
        rounds = {done: own for done, own in self._read(run, task).items() if done <= number}
        return rounds[max(rounds)] if rounds else Own()

    def keep(self, run: tuple[str, str], task: str, rounds: tuple[int, int], own: Own) -> None:
        """Remember ``own`` as after the second of ``rounds``, beside what was after the first. Raises `StorageError`."""
        if not own.values:
            return
        since, number = rounds
        before = {done: past for done, past in self._read(run, task).items() if done <= since}
        kept = {**{done: before[done] for done in sorted(before)[-1:]}, number: own}
        blob = save({f"{done}/{name}": values for done, one in kept.items() for name, values in one.values.items()})
        self.store.put(_key(run, task), blob)
        private = {name: values for name, values in own.values.items() if name.startswith(PRIVATE)}
        if private:
            self.store.put(_key(NEWEST, task), save(private))

    def newest(self, task: str) -> Own:
        """The private tensors that the last round of any run left of ``task``: the site answers with them. Raises `StorageError`."""
        blob = self.store.get(_key(NEWEST, task))
        return Own(load(blob) if blob else {})

    def _read(self, run: tuple[str, str], task: str) -> dict[int, Own]:
        blob, rounds = self.store.get(_key(run, task)), defaultdict[int, dict[str, Flat]](dict)
        for key, values in (load(blob) if blob else {}).items():
            number, _, name = key.partition("/")
            rounds[int(number)][name] = values
        return {number: Own(values) for number, values in rounds.items()}


def _named(tensors: Tensors, kind: str) -> dict[str, Flat]:
    return {kind + role: tensors.flat[span].copy() for role, span in tensors.layout.role_spans.items()}


def _key(run: tuple[str, str], task: str) -> str:
    return hashlib.sha256("\0".join((*run, task)).encode()).hexdigest()
