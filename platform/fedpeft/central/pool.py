"""The examples of several tasks as one pool, and the batches that are picked from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

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

    Causal language models: one packed row, ``owners`` (1, N) of every token. Encoder-decoders and classification: ``owners`` (B,) of
    every row.
    """

    batch: Batch
    owners: torch.Tensor


@dataclass(frozen=True, eq=False)
class Pool:
    """N examples of T tasks, numbered through in the order of ``names``; all tasks need the same kind of head.

    What it holds beside the tasks' data does not grow with N.
    """

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

    def owners_of(self, picks: Places) -> Places:
        """The number of the task of each of ``picks``."""
        return np.searchsorted(self.firsts, picks, "right") - 1

    def lengths_of(self, picks: Places) -> Places:
        """Tokens of each of ``picks``."""
        if self.data[0].patches:
            return np.full(len(picks), self.data[0].patches)
        return self._chosen(picks).lengths

    def terms_of(self, picks: Places) -> Places:
        """Terms of the loss of each of ``picks``: labelled tokens, or 1."""
        if not self.generative:
            return np.ones(len(picks), np.int64)
        chosen = self._chosen(picks)
        return np.maximum(chosen.lengths - np.maximum(chosen.starts, 1), 0)

    def counts(self, picks: Places) -> Places:
        """(T,) terms of the loss of each task among ``picks``."""
        return np.bincount(self.owners_of(picks), self.terms_of(picks), len(self.names)).astype(np.int64)

    def part(self, picks: Sequence[int] | Places) -> Part:
        """The batch of ``picks``, at least one of them."""
        import torch

        picks = np.asarray(picks, np.int64)
        chosen, owners = self._chosen(picks), torch.from_numpy(self.owners_of(picks))
        if self.generative:
            from fedpeft.tasks.likelihood import batch_of

            owners = owners if chosen.paired else owners.repeat_interleave(torch.from_numpy(chosen.lengths))[None]
            return Part(batch_of(chosen, range(len(picks)), len(picks)), owners)
        return Part(_padded(chosen), owners)

    def _chosen(self, picks: Places) -> Encoded:
        """The examples ``picks`` alone, of multiple choice the sequences that are learnt; nothing else is read."""
        ids, labels, starts = [], [], []
        for owner, pick in zip(self.owners_of(picks).tolist(), picks.tolist(), strict=True):
            data, place = self.data[owner], pick - int(self.firsts[owner])
            label = int(data.labels[place])
            place = label if self.generative else place
            ids.append(data.ids[place])
            labels.append(label)
            starts.append(int(data.starts[place]))
        first, kinds = self.data[0], (np.array(labels, np.int64), np.array(starts, np.int64))
        return Encoded(tuple(ids), *kinds, np.arange(len(ids)), first.pad, paired=first.paired, patches=first.patches)


def _padded(chosen: Encoded) -> Batch:
    import torch

    from fedpeft.tasks.filled import inputs_of

    inputs = inputs_of(chosen.ids, chosen.pad)
    return Batch(inputs, torch.from_numpy(chosen.labels), len(chosen), int(chosen.lengths.sum()), chosen.pad)
