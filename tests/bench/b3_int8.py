"""B3: the weighted mean of int8 messages with one float32 scale per block, beside Flower's float32 mean; CPU time and bytes received.

Two prototypes in numpy, neither of which ever holds a float32 copy of a message. ``own scales``: each site scales its blocks as it
likes, and of several messages at a time each block is one product (1, K) (K, block). ``round's scales``: the plan fixes the scale of
each block, so that the codes add as integers, the same bits in any order, and are scaled once; bytes are summed twice, whole modulo
256 and by their upper four bits, which together give the exact sum of 16 sites. ``cast`` is the cost of turning the codes to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.bench._common import aggregate, flat_of, layout_of, least, reply, row_of

from fedpeft.tensors import Tensors

ARRAYS, BLOCK, SPAN = 448, 2048, 1 << 15
SPEED = ((20, 22_321), (50, 8_928))
PLANE, PLANES = 1 << 18, 16

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Message:
    """What one site sends: ``codes`` (blocks * BLOCK,) and ``scales`` (blocks,), its weight multiplied in."""

    codes: NDArray[np.int8]
    scales: Vector

    @property
    def size(self) -> int:
        """Bytes."""
        return self.codes.nbytes + self.scales.nbytes


def run(repeats: int = 5) -> list[dict[str, object]]:
    """Rows of CPU seconds, and of bytes per value."""
    return [row for clients, size in SPEED for row in _rows(clients, size, repeats)]


def _rows(clients: int, size: int, repeats: int) -> list[dict[str, object]]:
    layout, rng = layout_of(ARRAYS, size), np.random.default_rng(0)
    weights = rng.uniform(0.2, 1.0, clients)
    replies, own, shared = [], [], []
    for weight in weights / weights.sum():
        delta = Tensors(layout, rng.standard_normal(layout.size, np.float32) * np.float32(1e-3))
        replies.append(reply(delta, float(weight)))
        own.append(encode(delta.flat, float(weight)))
        shared.append(encode(delta.flat, float(weight), 6e-3 * float(max(weights) / weights.sum())))
    contenders: dict[str, Callable[[], Any]] = {
        "peer": lambda: aggregate(replies),
        "own scales": lambda: mean_of_own(own, layout.size),
        "round's scales": lambda: mean_of_shared(shared, layout.size),
        "cast": lambda: _cast(own),
        "floor": lambda: [message.codes.view(np.uint64).max() for message in own],
    }
    _close(contenders, own, shared)
    seconds = least(contenders, repeats)
    case = f"fedavg_int8_fused {clients} x {layout.size / 1e6:.1f}M"
    rows = [row_of("B3", f"{case}, {name} (prototype)", seconds, name, "ratio >= 20") for name in ("own scales", "round's scales")]
    for row in rows:
        row["cast"] = seconds["cast"]
    return [*rows, _bytes(f"{case}, ingest", replies[0], own[0], layout.size)]


def _bytes(case: str, theirs: Any, ours: Message, size: int) -> dict[str, object]:
    from flwr.common.serde import recorddict_to_proto

    peer = len(recorddict_to_proto(theirs).SerializeToString()) / size
    return {
        "row": "B3",
        "case": case,
        "ours": ours.size / size,
        "peer": peer,
        "ratio": peer * size / ours.size,
        "goal": "ratio >= 4",
        "unit": "B/value",
    }


def encode(flat: Vector, weight: float, scale: float | None = None) -> Message:
    """Round ``weight * flat`` to 127 steps each way per block, of the block's own size or of ``scale``."""
    blocks = -(-flat.size // BLOCK)
    padded = np.zeros((blocks, BLOCK), np.float32)
    padded.reshape(-1)[: flat.size] = flat * np.float32(weight)
    scales = np.abs(padded).max(axis=1) / 127 if scale is None else np.full(blocks, scale / 127, np.float32)
    codes = np.clip(np.rint(padded / np.maximum(scales, 1e-30)[:, None]), -127, 127).astype(np.int8)
    return Message(codes.reshape(-1), scales.astype(np.float32))


def mean_of_own(messages: list[Message], size: int, together: int = 25) -> Vector:
    """The sum of ``messages``, some at a time: every block of codes becomes float32 in the cache and leaves it as a part of the sum."""
    out = np.zeros(messages[0].codes.size, np.float32)
    for first in range(0, len(messages), together):
        group = messages[first : first + together]
        wide = np.empty((len(group), SPAN), np.float32)
        scales = np.stack([message.scales for message in group], axis=1)[:, None, :]
        for start in range(0, out.size, SPAN):
            stop = min(start + SPAN, out.size)
            for row, message in zip(wide, group, strict=True):
                row[: stop - start] = message.codes[start:stop]
            blocks = wide[:, : stop - start].reshape(len(group), -1, BLOCK).transpose(1, 0, 2)
            out[start:stop] += np.matmul(scales[start // BLOCK : stop // BLOCK], blocks).reshape(-1)
    return out[:size]


def mean_of_shared(messages: list[Message], size: int) -> Vector:
    """The exact sum of the codes of ``messages``, which share their scales, times these."""
    out = np.empty(messages[0].codes.size, np.float32)
    low, high, shifted = (np.empty(PLANE, np.int8) for _ in range(3))
    total = np.empty(PLANE, np.int16)
    for start in range(0, out.size, PLANE):
        span = slice(start, min(start + PLANE, out.size))
        width = span.stop - start
        total[:width] = 0
        for first in range(0, len(messages), PLANES):
            group = [message.codes[span] for message in messages[first : first + PLANES]]
            total[:width] += _exact(group, low[:width], high[:width], shifted[:width])
        np.multiply(
            total[:width].reshape(-1, BLOCK),
            messages[0].scales[span.start // BLOCK : span.stop // BLOCK, None],
            out=out[span].reshape(-1, BLOCK),
        )
    return out[:size]


def _exact(group: list[NDArray[np.int8]], low: NDArray[np.int8], high: NDArray[np.int8], shifted: NDArray[np.int8]) -> NDArray[np.int16]:
    """The sum of up to 16 vectors of codes: their lower halves sum to at most 240 and their upper halves to within [-128, 112]."""
    low[:], high[:] = 0, 0
    for codes in group:
        np.add(low, codes, out=low)
        np.add(high, np.right_shift(codes, 4, out=shifted), out=high)
    upper = high.astype(np.int16) * np.int16(16)
    np.subtract(low, np.left_shift(high, 4, out=shifted), out=low)
    upper += low.view(np.uint8)
    return upper


def _cast(messages: list[Message]) -> None:
    row = np.empty(SPAN, np.float32)
    for message in messages:
        for start in range(0, message.codes.size, SPAN):
            part = message.codes[start : start + SPAN]
            row[: part.size] = part


def _close(contenders: dict[str, Callable[[], Any]], own: list[Message], shared: list[Message]) -> None:
    """Both means are within the sites' half steps of Flower's."""
    exact = flat_of(contenders["peer"]())
    for name, messages in (("own scales", own), ("round's scales", shared)):
        allowed = sum(float(message.scales.max()) for message in messages) / 2 * 1.01 + 1e-9
        if (worst := float(np.abs(contenders[name]() - exact).max())) > allowed:
            raise AssertionError(f"{name}: the mean is off by {worst}, the codes allow {allowed}")


if __name__ == "__main__":
    for found in run():
        print(found)
