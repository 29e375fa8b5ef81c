"""The examples of several tasks as one pool, and the batches that are picked from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import ConfigError, DataError
from fedpeft.tasks.protocol import Batch, Encoded

if TYPE_CHECKING:
    import torch

    from fedpeft.tasks import Task

Places = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Part:
    """What one rank computes of one micro-batch: ``owners`` says whose each term of the loss is, by number of the task.

    Language models: one packed row, ``owners`` (1, N) of every token. Classification: ``owners`` (B,) of every row.
    """

    batch: Batch
    owners: torch.Tensor


@dataclass(frozen=True, eq=False)
class Pool:
    """N examples of T tasks, numbered through in the order of ``names``; all tasks need the same kind of head."""

    names: tuple[str, ...]
    heads: tuple[str, ...]
    data: tuple[Encoded, ...]

    @staticmethod
    def of(tasks: Mapping[str, Task], data: Mapping[str, Encoded]) -> Pool:
        """The pool of ``data`` by task name.

        Raises:
            ConfigError: tasks need heads of different kinds.
            DataError: a task has no example.
        """
        kinds = {name: task.head.kind for name, task in tasks.items()}
        if len(set(kinds.values())) > 1:
            raise ConfigError(f"tasks: heads are {kinds}; tasks that train together need one kind, split the job in two")
        empty = sorted(name for name in tasks if not len(data[name]))
        if empty:
            raise DataError(f"tasks {empty}: no example to train on; give the sources rows of the train split")
        return Pool(tuple(tasks), tuple(kinds.values()), tuple(data[name] for name in tasks))

    @property
    def generative(self) -> bool:
        """Whether the tasks train a language model."""
        return self.heads[0] == "lm"

    @cached_property
    def firsts(self) -> Places:
        """(T + 1,) the number of each task's first example, and N."""
        return np.concatenate([[0], np.cumsum([len(part) for part in self.data])]).astype(np.int64)

    @cached_property
    def owners(self) -> Places:
        """(N,) the number of each example's task."""
        return np.repeat(np.arange(len(self.data)), np.diff(self.firsts))

    @cached_property
    def _sequences(self) -> Places:
        """(N,) where each example's sequence lies among all sequences: multiple choice has several of which one is learnt."""
        before = np.concatenate([[0], np.cumsum([len(part.ids) for part in self.data])])
        own = [part.labels if self.generative else np.arange(len(part)) for part in self.data]
        return np.concatenate([first + places for first, places in zip(before, own, strict=False)]).astype(np.int64)

    @cached_property
    def merged(self) -> Encoded:
        """All sequences, the arrays shared with the tasks'."""
        ids = tuple(sequence for part in self.data for sequence in part.ids)
        labels, starts = (np.concatenate([getattr(part, name) for part in self.data]) for name in ("labels", "starts"))
        return Encoded(ids, labels, starts, np.arange(len(ids)), self.data[0].pad)

    @cached_property
    def lengths(self) -> Places:
        """(N,) tokens of each example."""
        ids = self.merged.ids
        return np.array([len(ids[place]) for place in self._sequences], np.int64)

    @cached_property
    def terms(self) -> Places:
        """(N,) terms of the loss of each example: labelled tokens, or 1."""
        if not self.generative:
            return np.ones(len(self.owners), np.int64)
        starts = np.maximum(self.merged.starts[self._sequences], 1)
        return np.maximum(self.lengths - starts, 0)

    def counts(self, picks: Places) -> Places:
        """(T,) terms of the loss of each task among ``picks``."""
        return np.bincount(self.owners[picks], self.terms[picks], len(self.names)).astype(np.int64)

    def part(self, picks: Sequence[int] | Places) -> Part:
        """The batch of ``picks``, at least one of them."""
        import torch

        picks = np.asarray(picks, np.int64)
        places, owners = self._sequences[picks], torch.from_numpy(self.owners[picks])
        if self.generative:
            from fedpeft.tasks.likelihood import packed

            lengths = torch.from_numpy(self.lengths[picks])
            return Part(packed(self.merged, places.tolist(), len(picks)), owners.repeat_interleave(lengths)[None])
        return Part(self._padded(places), owners)

    def _padded(self, places: Places) -> Batch:
        import torch

        from fedpeft.tasks.likelihood import padded

        inputs: dict[str, Any] = padded([torch.from_numpy(self.merged.ids[place]).long() for place in places], self.merged.pad)
        labels = torch.from_numpy(self.merged.labels[places])
        return Batch(inputs, labels, len(places), int(inputs["attention_mask"].sum()), self.merged.pad)
