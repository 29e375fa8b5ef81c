"""Moments in a byte each (``optimizer = "adamw8bit"``; Dettmers et al. 2022, arXiv 2110.02861, section 2), in checkpoints for any ranks.

A rank's optimizer holds a code for each value of its part and a scale for each block of 256; blocks begin where parts begin, so they are
others on other ranks. A checkpoint holds values, not codes, and beside them every rank's scales. Whoever has the same parts finds codes
and scales again to the bit. On other parts blocks get new scales and values the nearest codes: off by at most half the distance of
two codes, which is 6 % of a value within a factor 10 of its block's largest, and what each step of training itself rounds by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 256
"""Codes to a scale."""
PARTS = {"exp_avg": ("state1", "qmap1", "absmax1"), "exp_avg_sq": ("state2", "qmap2", "absmax2")}
"""What bitsandbytes calls the codes, the code book and the scales of each moment."""
BOOKS = {"exp_avg": "dynamic", "exp_avg_sq": "udynamic"}
SCALES = "(moments)|scales"
"""What a checkpoint calls the scales (ranks, blocks) of all ranks."""


def decoded(codes: Tensor, book: Tensor, scales: Tensor) -> Tensor:
    """Values in float32 of ``codes``, in their shape: their entries of ``book`` (256,), times their blocks' ``scales`` (blocks,)."""
    flat = codes.flatten()
    return (book[flat.long()] * scales.repeat_interleave(BLOCK)[: len(flat)]).view(codes.shape)


def coded(values: Tensor, book: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes, scales of ``values``: a block keeps its own of ``scales`` where that gives its values to the bit, else takes the largest."""
    own = _blocks(values.abs()).amax(1)
    codes = _nearest(values, book, own)
    if scales is not None and scales.shape == own.shape:
        before = _nearest(values, book, scales)
        exact = (_blocks(decoded(before, book, scales)) == _blocks(values)).all(1)
        own = torch.where(exact, scales, own)
        codes = _nearest(values, book, own)
    return codes, own


@contextmanager
def widened(inner: Any) -> Iterator[None]:
    """Within, ``inner``'s moments are there as values in float32, as those of torch's AdamW are."""
    for state in inner.state.values():
        for moment, names in PARTS.items():
            if names[0] in state:
                codes, *rest = (state.get(name) for name in names)
                state[moment] = codes if codes.dtype == torch.float32 else decoded(codes, *rest)
    try:
        yield
    finally:
        for state in inner.state.values():
            for moment, names in PARTS.items():
                if names[0] in state:
                    state.pop(moment, None)


def narrowed(inner: Any, stepped: Sequence[Tensor], steps: int, scales: Tensor | None) -> None:
    """Make codes of the moments that ``inner`` holds as values in float32, after ``steps`` steps; ``scales`` (blocks,) are this rank's."""
    place = 0
    for param in stepped:
        state, fresh = inner.state[param], dict[str, Any](step=steps)
        for moment, (name, book, largest) in PARTS.items():
            values = state.pop(moment)
            if values.numel() < inner.args.min_8bit_size:
                fresh[name] = values
                continue
            fresh[book] = inner.name2qmap[BOOKS[moment]].to(param.device)
            count = -(-values.numel() // BLOCK)
            given = None if scales is None else scales[place : place + count].to(param.device)
            fresh[name], fresh[largest] = coded(values, fresh[book], given)
            place += count
        inner.state[param] = fresh


def gathered_scales(inner: Any, stepped: Sequence[Tensor], ranks: int) -> dict[str, NDArray[np.float32]]:
    """The scales of all ranks, in the order of what they step on; a collective. Nothing where moments are no codes."""
    states = [inner.state[param] for param in stepped if param in inner.state]
    own = [state[names[2]] for state in states for names in PARTS.values() if names[2] in state]
    if not own:
        return {}
    every = [mine := torch.cat(own)]
    if ranks > 1:
        every = [torch.empty_like(mine) for _ in range(ranks)]
        torch.distributed.all_gather(every, mine)
    return {SCALES: torch.stack(every).cpu().numpy()}


def scales_of(arrays: Mapping[str, NDArray[Any]], rank: int, ranks: int) -> Tensor | None:
    """This rank's scales in a checkpoint of as many ranks, else None."""
    found = arrays.get(SCALES)
    return None if found is None or len(found) != ranks else torch.from_numpy(np.array(found[rank]))


def _nearest(values: Tensor, book: Tensor, scales: Tensor) -> Tensor:
    between = (book[1:] + book[:-1]) / 2
    ratios = _blocks(values) / torch.where(scales > 0, scales, 1.0)[:, None]
    return torch.bucketize(ratios.flatten()[: values.numel()], between).to(torch.uint8).view(values.shape)


def _blocks(values: Tensor) -> Tensor:
    """(blocks, 256) of values in any shape, the last one filled up with zeros."""
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
