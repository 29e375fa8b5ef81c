"""Batches and the loss of encoder-decoders: prompts in the encoder's rows, completions in the decoder's.

Nothing is packed: cross-attention would need a mask of its own for every sequence of a row, which no architecture takes from outside.
Rows are filled up at the end. Decoders attend to what came before alone, so that theirs need no mask.

Shape suffixes in comments: S sequences, T longest prompt, U longest completion, K labelled tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fedpeft.tasks.chunked import head_of, losses_at
from fedpeft.tasks.filled import IGNORED, device_of, filled, padded
from fedpeft.tasks.protocol import Batch, Encoded


def paired(data: Encoded, places: Sequence[int], examples: int) -> Batch:
    """The sequences ``places`` of ``data``, one a row."""
    found = [(torch.from_numpy(data.ids[place]).long(), int(data.starts[place])) for place in places]
    inputs = padded([ids[: start - 1] for ids, start in found], data.pad)
    inputs["decoder_input_ids"] = filled([ids[start - 1 : -1] for ids, start in found], data.pad)
    labels = filled([ids[start:] for ids, start in found], IGNORED)
    return Batch(inputs, labels, examples, sum(len(ids) for ids, _ in found), data.pad)


def is_paired(batch: Batch) -> bool:
    """Whether ``batch`` is of this form."""
    return "decoder_input_ids" in batch.inputs


def paired_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy (K,) in nats of every labelled token, row by row, in one call of the model."""
    device, head = device_of(model), head_of(model)
    inputs: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()} | {"use_cache": False}
    kept = (batch.labels != IGNORED).to(device, non_blocking=True)
    labels = batch.labels.to(device, non_blocking=True)[kept]
    if head is None:
        return cross_entropy(model(**inputs).logits[kept].float(), labels, reduction="none")  # of (S, U, V)
    with losses_at(head, labels, kept):
        return model(**inputs).logits[0].float()  # type: ignore[no-any-return]


def paired_owners(batch: Batch) -> torch.Tensor:
    """For each labelled token (K,) the number of its row."""
    return (batch.labels != IGNORED).nonzero()[:, 0]


def paired_parts(batch: Batch, limit: int) -> Iterator[Batch]:
    """Runs of rows of at most ``limit`` tokens with their filling (a longer row stays alone); usually the batch itself."""
    rows = len(batch.labels)
    size = max(1, limit // (batch.inputs["input_ids"].shape[1] + batch.labels.shape[1]))
    yield from [batch] if size >= rows else (_rows(batch, start, start + size) for start in range(0, rows, size))


def paired_singles(batch: Batch) -> Iterator[Batch]:
    """Each row in a batch of its own, as one example."""
    for row in range(len(batch.labels)):
        yield _rows(batch, row, row + 1)


def _rows(batch: Batch, start: int, end: int) -> Batch:
    """Some rows, without the filling that all of them have in common."""
    mask, labels = batch.inputs["attention_mask"][start:end], batch.labels[start:end]
    read, said = int(mask.sum(1).max()), int((labels != IGNORED).sum(1).max())
    inputs = {name: value[start:end, : said if name == "decoder_input_ids" else read] for name, value in batch.inputs.items()}
    tokens = int(mask.sum() + (labels != IGNORED).sum()) + len(labels)
    return Batch(inputs, labels[:, :said], len(labels), tokens, batch.pad)
