"""From one batch to the sum of its examples' clipped gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from fedpeft.training.scaling import of_sum
from fedpeft.training.settings import TrainSettings

if TYPE_CHECKING:
    from fedpeft.adapters.live import Live
    from fedpeft.tasks import Task


RETREAT = 16.0
"""By what the loss scale of an example is divided as long as its gradient overflows."""


@dataclass(frozen=True)
class Bound:
    """The ``norm`` that no example's gradient exceeds, and the ``scale`` of losses where gradients pass through fp16.

    Unlike `scaling.Scaler`'s, this scale remembers nothing: what it would learn from one example would show in how others are rounded,
    and a step that is skipped would tell that somebody's gradient is large.
    """

    norm: float
    scale: float = 1.0


def add_clipped(recorder: Recorder, live: Live, task: Task, settings: TrainSettings, batch: Batch, bound: Bound) -> Sums:
    """Add ``sum_n g_n min(1, norm / |g_n|)`` to the trained tensors' gradients, g_n being that of example n's mean loss per term.

    Where an example's gradient is not finite each of its batch is run alone, since in a masked product it spoils the others; then at
    smaller scales; if it is not finite at any, it adds nothing. The loss's sum and number of terms stay with the caller.

    Raises:
        PrivacyError: the examples cannot be told apart.
    """
    sums = record(recorder, live, task, settings, batch, bound.scale)
    terms = terms_of(batch).to(live.flat.device)
    norms = recorder.squares().sqrt() / terms
    if bool(torch.isfinite(norms).all()):
        add_weighted(recorder, live, bound.norm / norms.clamp(min=bound.norm) / terms)
    elif batch.examples > 1:
        for alone in singles(batch):
            add_clipped(recorder, live, task, settings, alone, bound)
    elif bound.scale > 1.0:
        add_clipped(recorder, live, task, settings, batch, replace(bound, scale=bound.scale / RETREAT))
    return sums


def record(recorder: Recorder, live: Live, task: Task, settings: TrainSettings, batch: Batch, scale: float = 1.0) -> Sums:
    """One forward and backward of ``batch`` under ``recorder``, its mean loss multiplied by ``scale``."""
    with recorder.expect(rows_of(batch)):
        with autocast(settings, live.flat.device):
            loss = task.loss(live.model, batch)
        if loss.count:
            recorder.scale = 1.0 if scale == 1.0 else of_sum(scale, loss.count)
            (loss.total * recorder.scale).backward()  # type: ignore[no-untyped-call]
    return Sums(float(loss.total.detach()), loss.count)


def add_weighted(recorder: Recorder, live: Live, weights: Tensor) -> None:
    """Add the examples' gradients under ``weights`` (N,) to the trained tensors' own, and forget them."""
    for name, gradients in recorder.found.items():
        gradient = live.parameters[name].grad
        assert gradient is not None
        gradient.add_(gradients.weighted(weights / recorder.scale).view_as(gradient))
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
    mask = batch.inputs.get("attention_mask")
    for row in range(batch.examples):
        tokens = None if mask is None else int(mask[row].sum())
        own = {name: value[row : row + 1, :tokens] for name, value in batch.inputs.items()}
        yield Batch(own, batch.labels[row : row + 1], 1, tokens or batch.tokens // batch.examples)


def _lengths(batch: Batch) -> tuple[int, ...]:
    positions = batch.inputs["position_ids"][0]
    starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
    return tuple(after - before for before, after in pairwise(starts))
