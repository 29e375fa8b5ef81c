"""The loss of language models, and causal ones': sequences packed into one row, output layer on labelled positions only, no logits kept.

What an encoder-decoder's batch is, `paired` says.

Shape suffixes in comments: N tokens of the packed row, K labelled positions, S sequences, T longest sequence, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fedpeft.tasks.chunked import head_of, losses_at
from fedpeft.tasks.filled import IGNORED, device_of, filled, padded
from fedpeft.tasks.paired import is_paired, paired, paired_losses, paired_owners, paired_parts
from fedpeft.tasks.protocol import Batch, Encoded, Ids

PACK = 2048
"""Most tokens of one packed forward on a CPU: attention over a packed row can cost the square of its length."""
PACK_CUDA = 8192
"""The same on other devices, which need long rows to be busy."""

_padding: ContextVar[bool] = ContextVar("padding", default=False)


@contextmanager
def padding(wanted: bool = True) -> Iterator[None]:
    """Fill sequences up to the longest of their batch, whether or not the model could take them packed."""
    token = _padding.set(wanted)
    try:
        yield
    finally:
        _padding.reset(token)


def batch_of(data: Encoded, places: Sequence[int], examples: int) -> Batch:
    """The sequences ``places`` of ``data`` as what one forward needs, in the form that the base's family takes."""
    return (paired if data.paired else packed)(data, places, examples)


def packed(data: Encoded, places: Sequence[int], examples: int) -> Batch:
    """The sequences ``places`` of ``data`` in one row, with positions that restart and labels already shifted."""
    chosen = [data.ids[place] for place in places]
    ids = torch.cat([torch.from_numpy(sequence).long() for sequence in chosen])
    positions = torch.cat([torch.arange(len(sequence)) for sequence in chosen])
    labels = torch.cat([_shifted(data.ids[place], int(data.starts[place])) for place in places])
    inputs = {"input_ids": ids[None], "position_ids": positions[None]}
    return Batch(inputs, labels[None], examples, len(ids), data.pad)


def _shifted(ids: Ids, start: int) -> torch.Tensor:
    """At each position the token to predict next, from the one before ``start`` on."""
    labels = torch.full((len(ids),), IGNORED)
    first = max(start, 1)
    labels[first - 1 : -1] = torch.from_numpy(ids[first:]).long()
    return labels


def token_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy (K,) in nats of every labelled token of a batch, in its order."""
    parts = paired_parts if is_paired(batch) else _parts
    limit = PACK if device_of(model).type == "cpu" else PACK_CUDA
    return torch.cat([single_forward(model, part) for part in parts(batch, limit)])


def single_forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """As `token_losses`, in one call of the model whatever its length: ranks that share a model must call it equally often."""
    if is_paired(batch):
        return paired_losses(model, batch)
    return (_packed_losses if packs(model) else _padded_losses)(model, batch)


def owners(batch: Batch) -> torch.Tensor:
    """For each labelled token (K,) the number of its sequence in the batch."""
    if is_paired(batch):
        return paired_owners(batch)
    sequence = (batch.inputs["position_ids"] == 0).cumsum(1) - 1
    return sequence[batch.labels != IGNORED]


def packs(model: torch.nn.Module) -> bool:
    """Whether the model tells packed sequences apart by ``position_ids`` and can restrict its output layer to given positions.

    Decided by the signature of its forward; a peft wrapper that adds virtual tokens shifts positions, and so does not pack. Nor does
    any model within `padding`.
    """
    if _padding.get():
        return False
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        return False
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return {"position_ids", "logits_to_keep"} <= set(inspect.signature(type(inner).forward).parameters)


def _packed_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    device = device_of(model)
    keep = (batch.labels[0] != IGNORED).nonzero()[:, 0]
    inputs: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()}
    inputs |= {"logits_to_keep": keep.to(device), "use_cache": False}
    labels, head = batch.labels[0, keep].to(device), head_of(model)
    if head is None:
        return cross_entropy(model(**inputs).logits[0].float(), labels, reduction="none")  # of (K, V)
    with losses_at(head, labels):
        return model(**inputs).logits[0].float()  # type: ignore[no-any-return]


def _padded_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    device, lengths = device_of(model), _lengths(batch)
    inputs = padded(batch.inputs["input_ids"][0].split_with_sizes(lengths), batch.pad)
    labels = filled(batch.labels[0].split_with_sizes(lengths), IGNORED).to(device)
    logits = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False).logits
    logits = logits[:, -labels.shape[1] :]  # virtual tokens stand before the text: (S, T, V)
    return cross_entropy(logits[labels != IGNORED].float(), labels[labels != IGNORED], reduction="none")


def _lengths(batch: Batch) -> list[int]:
    positions = batch.inputs["position_ids"][0]
    starts = (positions == 0).nonzero()[:, 0].tolist()
    return [after - before for before, after in zip(starts, [*starts[1:], len(positions)], strict=True)]


def _parts(batch: Batch, limit: int) -> Iterator[Batch]:
    """Runs of whole sequences of at most ``limit`` tokens (a longer sequence stays alone); usually the batch itself."""
    start = end = 0
    for length in _lengths(batch):
        if end > start and end + length - start > limit:
            yield _part(batch, start, end)
            start = end
        end += length
    yield batch if start == 0 else _part(batch, start, end)


def _part(batch: Batch, start: int, end: int) -> Batch:
    inputs = {name: value[:, start:end] for name, value in batch.inputs.items()}
    return Batch(inputs, batch.labels[:, start:end], 0, end - start, batch.pad)
