"""Which way runs for which shape: measured once per shape on the device at hand, and kept; a setting overrides it.

All ways give the same numbers up to rounding. Where two processes must agree bit for bit, name the way, or hand the `Choices` of one to
the other, as a checkpoint does.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from fedpeft.errors import ConfigError
from fedpeft.mixtures.fused import Fused, available
from fedpeft.mixtures.plans import Blend, Pairs, Share
from fedpeft.mixtures.ways import Batched, Grouped, Loop, Segments, Stacked, Way

Paired = type[Batched] | type[Segments] | type[Grouped] | type[Fused]
PAIRED: dict[str, Paired] = {"batched": Batched, "segments": Segments, "grouped": Grouped, "fused": Fused}
WAYS = ("auto", "loop", *PAIRED)
ROUNDS = 3
log = logging.getLogger("fedpeft.mixtures")
FASTEST: dict[str, str] = {}
"""The way that was fastest in this process, by `key_of` it."""
AFTER = "segments"
"""What runs for every shape, where nothing else is known to."""


@dataclass(frozen=True)
class Shape:
    """What decides: the tokens of the batch, the type they are in, factors (T, R, I) and (T, O, R), and whether these train."""

    tokens: int
    dtype: torch.dtype
    rank: int
    width_in: int
    width_out: int
    training: bool


def check_way(name: str, device: str) -> str:
    """``name``, if it is a way that runs on ``device``. Raises `ConfigError` naming the ways."""
    if name not in WAYS:
        raise ConfigError(f"mixture: way {name!r} is unknown; choose one of {list(WAYS)}")
    if name == "fused" and not available(torch.device(device).type):
        raise ConfigError(f"mixture: way 'fused' needs CUDA and triton, this base is on {device}; choose one of {list(WAYS)[:-1]}")
    return name


def way_for(share: Share, name: str, shape: Shape, auto: Callable[[Pairs, Shape], str]) -> tuple[Way, Tensor | None]:
    """The way for a share, and its weights; ``auto`` names it where ``name`` leaves that open."""
    plan = share.plan
    if name == "loop":
        return Loop(share.matrix), share.matrix
    if isinstance(plan, Blend):
        return Stacked(plan), plan.weights
    return PAIRED[auto(plan, shape) if name == "auto" else name](plan), plan.weights


@dataclass
class Choices:
    """What one bank's products take, by shape; once ``settled``, a shape that was not met before is timed no more.

    It then takes the way of most others, so that all that is taken from there on follows from ``kept``.
    """

    kept: dict[str, str] = field(default_factory=dict)
    settled: bool = False
    _later: dict[str, str] = field(default_factory=dict)

    def recall(self, kept: Mapping[str, str]) -> None:
        """Go on with what another process took, as far as it runs here."""
        here = {key: way for key, way in kept.items() if way in PAIRED and (way != "fused" or available(key.partition(" ")[0]))}
        self.kept, self.settled = {**self.kept, **here}, True

    def __call__(self, plan: Pairs, shape: Shape) -> str:
        """The way for this plan and shape."""
        key = key_of(plan, shape)
        if key in self.kept:
            return self.kept[key]
        if not self.settled:
            return self.kept.setdefault(key, fastest(plan, shape))
        if key not in self._later:
            votes = Counter(self.kept.values())
            usual = max(sorted(votes), key=votes.__getitem__, default=AFTER)
            runs = _seconds(PAIRED[usual](plan), plan, shape) < inf
            self._later[key] = usual if runs else AFTER
        return self._later[key]


def key_of(plan: Pairs, shape: Shape) -> str:
    """What is measured once: plans of about as many tokens, pairs and slots share it."""
    bucket = (shape.tokens.bit_length(), len(plan.slots).bit_length(), len(plan.runs).bit_length(), plan.uniform is None)
    return f"{plan.slots.device.type} {bucket} {shape.dtype} {shape.rank} {shape.width_in} {shape.width_out} {shape.training}"


def fastest(plan: Pairs, shape: Shape) -> str:
    """The way with the least time for this plan and shape on the device at hand, measured once in this process."""
    key = key_of(plan, shape)
    if key not in FASTEST:
        names = [name for name in PAIRED if name != "fused" or available(plan.slots.device.type)]
        seconds = {name: _seconds(PAIRED[name](plan), plan, shape) for name in names}
        FASTEST[key] = min(seconds, key=seconds.__getitem__)
    return FASTEST[key]


def _seconds(way: Way, plan: Pairs, shape: Shape) -> float:
    """The best of a few rounds of the products of one layer; infinite where the device or library has no such product."""
    device = plan.slots.device
    x = torch.zeros(shape.tokens, shape.width_in, dtype=shape.dtype, device=device)
    y = torch.zeros(shape.tokens, shape.width_out, dtype=shape.dtype, device=device)
    a = torch.zeros(plan.capacity, shape.rank, shape.width_in, dtype=shape.dtype, device=device)
    b = torch.zeros(plan.capacity, shape.width_out, shape.rank, dtype=shape.dtype, device=device)
    best = inf
    try:
        _layer(way, (x, y, a, b), shape.training)
        for _ in range(ROUNDS):
            began = _now(device)
            _layer(way, (x, y, a, b), shape.training)
            best = min(best, _now(device) - began)
    except Exception as fault:  # noqa: BLE001 - a kernel may fail to compile in its own ways; the loop's ways always run
        log.warning("mixture: way %s cannot run here (%s: %s); another one is taken", type(way).__name__, type(fault).__name__, fault)
        return inf
    return best


@torch.no_grad()
def _layer(way: Way, tensors: tuple[Tensor, Tensor, Tensor, Tensor], training: bool) -> None:
    """The products of one forward, and of one backward."""
    x, y, a, b = tensors
    part = way.take(x)
    h = way.down(part, a)
    way.up(y, h, b)
    if training:
        g = way.take(y)
        gh = way.down(g, b.transpose(1, 2))
        way.up(x, gh, a.transpose(1, 2))
        way.grad_a(gh, part, torch.zeros(a.shape, device=a.device))
        way.grad_b(g, h, torch.zeros(b.shape, device=b.device))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.thread_time()
