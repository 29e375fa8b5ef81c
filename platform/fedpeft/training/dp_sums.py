"""From one batch to the sum of its examples' clipped gradients."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedpeft.errors import PrivacyError
from fedpeft.tasks.paired import is_paired, paired_singles
from fedpeft.tasks.protocol import Batch
from fedpeft.training.dp_recorder import Recorder
from fedpeft.training.dp_rows import Rows
from fedpeft.training.engine import Sums, autocast
from fedpeft.training.settings import TrainSettings

if TYPE_CHECKING:
    from fedpeft.adapters.live import Live
    from fedpeft.tasks import Task


def add_clipped(recorder: Recorder, live: Live, task: Task, settings: TrainSettings, batch: Batch, clip: float) -> Sums:
    """Add ``sum_n g_n min(1, clip / |g_n|)`` to the trained tensors' gradients, g_n being that of example n's mean loss per term.

    An example whose gradient is not finite adds nothing; each of its batch is then run alone, since in a masked product it spoils
    the others. The loss's sum and number of terms stay with the caller.

    Raises:
        PrivacyError: the examples cannot be told apart.
    """
    sums = record(recorder, live, task, settings, batch)
    terms = terms_of(batch).to(live.flat.device)
    norms = recorder.squares().sqrt() / terms
    if bool(torch.isfinite(norms).all()):
        add_weighted(recorder, live, clip / norms.clamp(min=clip) / terms)
    elif batch.examples > 1:
        for alone in singles(batch):
            add_clipped(recorder, live, task, settings, alone, clip)
    return sums


def record(recorder: Recorder, live: Live, task: Task, settings: TrainSettings, batch: Batch) -> Sums:
    """One forward and backward of ``batch`` under ``recorder``."""
    with recorder.expect(rows_of(batch)):
        with autocast(settings, live.flat.device):
            loss = task.loss(live.model, batch)
        if loss.count:
            loss.total.backward()  # type: ignore[no-untyped-call]
    return Sums(float(loss.total.detach()), loss.count)


def add_weighted(recorder: Recorder, live: Live, weights: Tensor) -> None:
    """Add the examples' gradients under ``weights`` (N,) to the trained tensors' own, and forget them."""
    for name, gradients in recorder.found.items():
        gradient = live.parameters[name].grad
        assert gradient is not None
        gradient.add_(gradients.weighted(weights).view_as(gradient))
    recorder.found = {}


def rows_of(batch: Batch) -> Rows:
    """How ``batch`` holds its examples: one a row (of encoder and decoder), or one after the other in a packed row.

    Raises:
        PrivacyError: a packed row holds another number of sequences than of examples.
    """
    if "position_ids" not in batch.inputs:
        return Rows(batch.examples)
    lengths = _lengths(batch)
    if len(lengths) != batch.examples:
        raise PrivacyError(
            f"example-level privacy: a packed row has {len(lengths)} sequences of {batch.examples} examples, so that rows mix; "
            "use a task with one sequence per example"
        )
    return Rows(batch.examples, lengths)


def terms_of(batch: Batch) -> Tensor:
    """The number of loss terms of each example (N,), 1 where there is none."""
    if batch.labels.dim() == 1:
        return torch.ones(batch.examples)
    if is_paired(batch):
        return (batch.labels >= 0).sum(1).clamp(min=1).float()
    labelled = torch.split(batch.labels[0] >= 0, list(_lengths(batch)))
    return torch.stack([part.sum() for part in labelled]).clamp(min=1).float()


def singles(batch: Batch) -> Iterator[Batch]:
    """Each example of ``batch`` in a batch of its own, without padding."""
    if "position_ids" in batch.inputs:
        cuts = [torch.split(value, list(_lengths(batch)), 1) for value in (*batch.inputs.values(), batch.labels)]
        for *inputs, labels in zip(*cuts, strict=True):
            yield Batch(dict(zip(batch.inputs, inputs, strict=True)), labels, 1, labels.shape[1], batch.pad)
        return
    if is_paired(batch):
        yield from paired_singles(batch)
        return
    for row in range(batch.examples):
        tokens = int(batch.inputs["attention_mask"][row].sum())
        yield Batch({name: value[row : row + 1, :tokens] for name, value in batch.inputs.items()}, batch.labels[row : row + 1], 1, tokens)


def _lengths(batch: Batch) -> tuple[int, ...]:
    positions = batch.inputs["position_ids"][0]
    starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
    return tuple(after - before for before, after in pairwise(starts))
