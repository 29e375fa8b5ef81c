"""What each torch function does with a trained tensor, and what its gradient per example is made of.

A rule answers ``NotImplemented`` where no trained tensor is read, or where it is read in a way that the rule does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.methods import lowrank
from fedpeft.training.dp_recorder import Recorder
from fedpeft.training.dp_rows import Factors, PerExample, Rows, Whole, outer, scattered, total

Rule = Callable[..., Any]


def linear(recorder: Recorder, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``x W' + b``, either trained."""
    own_w, own_b, rows = recorder.watches(weight), recorder.watches(bias), recorder.rows
    if not (own_w or own_b):
        return NotImplemented

    def note(g: Tensor, *saved: Tensor) -> None:
        parts = rows.split(g)
        if own_w:
            recorder.add(weight, outer(parts, rows.split(saved[0])))
        if own_b:
            recorder.add(bias, total(parts))

    y = func(x, still(weight) if own_w else weight, still(bias) if own_b and bias is not None else bias)
    return recorder.tap(y, note, *[x.detach()][:own_w])


def addmm(recorder: Recorder, func: Any, bias: Tensor, x: Tensor, weight: Tensor) -> Any:
    """``b + x W`` with b trained: GPT-2's linear layer."""
    if not recorder.watches(bias) or recorder.watches(weight):
        return NotImplemented
    rows = recorder.rows
    return recorder.tap(func(still(bias), x, weight), lambda g: recorder.add(bias, total(rows.split(g))))


def layer_norm(recorder: Recorder, func: Any, x: Tensor, shape: Any, **settings: Any) -> Any:
    """``norm(x) w + b``, either trained; torch passes all but input and shape by name."""
    weight, bias, rows = settings.get("weight"), settings.get("bias"), recorder.rows
    own_w, own_b = recorder.watches(weight), recorder.watches(bias)
    if not (own_w or own_b) or len(shape) != 1:
        return NotImplemented

    def note(g: Tensor, *saved: Tensor) -> None:
        if own_w:
            recorder.add(weight, total(rows.split(g * F.layer_norm(saved[0], shape, eps=settings["eps"]))))
        if own_b:
            recorder.add(bias, total(rows.split(g)))

    fixed = {name: still(settings[name]) for name in ("weight", "bias") if recorder.watches(settings.get(name))}
    return recorder.tap(func(x, shape, **settings | fixed), note, *[x.detach()][:own_w])


def multiply(recorder: Recorder, func: Any, one: Any, other: Any) -> Any:
    """``x v`` with a trained gain v for each channel; a number times a trained tensor is that tensor in another form."""
    gain, x = (one, other) if recorder.watches(one) else (other, one)
    if not recorder.watches(gain) or recorder.watches(x):
        return NotImplemented
    if isinstance(x, int | float):
        return _renamed(recorder, func(one, other), gain, float(x))
    if not _per_channel(gain, x):
        return NotImplemented
    rows = recorder.rows
    y = func(*(still(value) if value is gain else value for value in (one, other)))
    return recorder.tap(y, lambda g, x: recorder.add(gain, total(rows.split(g * x))), x.detach())


def add(recorder: Recorder, func: Any, one: Any, other: Any, **settings: Any) -> Any:
    """``x + v`` with a trained shift v for each channel."""
    shift, x = (one, other) if recorder.watches(one) else (other, one)
    if not recorder.watches(shift) or recorder.watches(x) or settings or not _per_channel(shift, x):
        return NotImplemented
    rows = recorder.rows
    y = func(*(still(value) if value is shift else value for value in (one, other)))
    return recorder.tap(y, lambda g: recorder.add(shift, total(rows.split(g))))


def subtract(recorder: Recorder, func: Any, one: Any, other: Any, **settings: Any) -> Any:
    """``v - c``: a trained vector less frozen values of its own shape."""
    fixed = isinstance(other, Tensor) and not other.requires_grad
    if settings or not recorder.watches(one) or not fixed or other.shape != one.shape:
        return NotImplemented
    return _renamed(recorder, func(one, other), one)


def embedding(recorder: Recorder, func: Any, places: Tensor, table: Tensor, *settings: Any, **named: Any) -> Any:
    """Rows of a trained table: virtual tokens, for every example or once for all of them."""
    if not recorder.watches(table):
        return NotImplemented
    rows, count = recorder.rows, len(table)
    if places.shape == (1, count) and bool((places[0] == torch.arange(count, device=places.device)).all()):
        return _renamed(recorder, func(places, table, *settings, **named), table)

    def note(g: Tensor, places: Tensor) -> None:
        recorder.add(table, scattered(rows.split(places.unsqueeze(-1)), rows.split(g), count))

    return recorder.tap(func(places, still(table), *settings, **named), note, places)


def repeat(recorder: Recorder, func: Any, value: Tensor, *sizes: Any) -> Any:
    """Virtual tokens (1, T, W), once for every example."""
    count = recorder.rows.count
    if not recorder.watches(value) or sizes != (count, 1, 1) or len(value) != 1:
        return NotImplemented
    return recorder.tap(func(still(value), *sizes), lambda g: recorder.add(value, Whole(g.reshape(count, -1))))


def low_rank(recorder: Recorder, func: Any, x: Tensor, dropout: float, bases: Any, *factors: Tensor) -> Any:
    """Our fused LoRA layers. One dropout mask for each example: a mask that two share would tie their gradients together."""
    if not any(recorder.watches(factor) for factor in factors):
        return NotImplemented
    taker = _Taker(recorder, factors)
    if not dropout:
        return lowrank.apply(x, None, bases, taker, *factors)
    branches = lowrank.apply(x * mask(recorder.rows, x, dropout), None, [None] * len(bases), taker, *factors)
    return tuple(
        low if base is None else low + F.linear(x, lowrank.dense(base[0]), base[1]) for low, base in zip(branches, bases, strict=True)
    )


def same(recorder: Recorder, func: Any, value: Any, *arguments: Any, **named: Any) -> Any:
    """A trained tensor in another shape or dtype, its values in the same order."""
    if not recorder.watches(value):
        return NotImplemented
    return _renamed(recorder, func(value, *arguments, **named), value)


RULES: dict[Any, Rule] = {
    F.linear: linear,
    torch.addmm: addmm,
    F.layer_norm: layer_norm,
    F.embedding: embedding,
    lowrank.low_rank: low_rank,
    Tensor.mul: multiply,
    torch.mul: multiply,
    Tensor.__rmul__: multiply,
    Tensor.__mul__: multiply,
    Tensor.add: add,
    torch.add: add,
    Tensor.__radd__: add,
    Tensor.__add__: add,
    Tensor.sub: subtract,
    torch.sub: subtract,
    Tensor.__sub__: subtract,
    Tensor.repeat: repeat,
    Tensor.to: same,
    Tensor.float: same,
    Tensor.flatten: same,
    Tensor.view: same,
    Tensor.reshape: same,
    Tensor.contiguous: same,
}


class _Taker:
    """Takes the halves of fused layers' gradients; ``factors`` are the A's (R, I), then the B's (O, R)."""

    def __init__(self, recorder: Recorder, factors: tuple[Tensor, ...]) -> None:
        self.recorder, self.rows, count = recorder, recorder.rows, len(factors) // 2
        self.falls, self.rises = factors[:count], factors[count:]

    def down(self, gh: Tensor, x: Tensor) -> None:
        """See `lowrank.Taker.down`."""
        found, start = outer(self.rows.split(gh.t()), self.rows.split(x.detach())), 0
        for a in self.falls:
            if self.recorder.watches(a):
                self.recorder.add(a, _cut(found, slice(start, start + len(a))))
            start += len(a)

    def up(self, place: int, h: Tensor, g: Tensor) -> None:
        """See `lowrank.Taker.up`."""
        if self.recorder.watches(self.rises[place]):
            self.recorder.add(self.rises[place], outer(self.rows.split(g), self.rows.split(h.t())))


def mask(rows: Rows, x: Tensor, dropout: float) -> Tensor:
    """Inverted dropout of x's last axis, one draw for each example, to multiply x by."""
    drawn = x.new_empty(rows.count, x.shape[-1]).bernoulli_(1.0 - dropout).div_(1.0 - dropout)
    if rows.lengths and x.shape[:2] == (1, sum(rows.lengths)):
        return drawn.repeat_interleave(torch.tensor(rows.lengths, device=x.device), 0).unsqueeze(0)
    rows.split(x)  # refuses what cannot be told apart
    return drawn.view(rows.count, *[1] * (x.dim() - 2), -1)


def still(value: Tensor) -> Tensor:
    """``value``, for which autograd computes nothing."""
    return value.detach()


def _cut(gradients: PerExample, part: slice) -> PerExample:
    """The rows ``part`` of stacked matrices' gradients."""
    if isinstance(gradients, Factors):
        left = gradients.left
        return Factors(left[..., part] if isinstance(left, Tensor) else [one[:, part] for one in left], gradients.right)
    assert isinstance(gradients, Whole)
    values = gradients.values[..., part] if gradients.turned else gradients.values[:, part]
    return Whole(values, gradients.turned)


def _renamed(recorder: Recorder, value: Any, other: Tensor, factor: float = 1.0) -> Any:
    recorder.alias(value, other, factor)
    return value


def _per_channel(vector: Tensor, x: Any) -> bool:
    """Whether ``vector`` is spread over all axes of x but the last."""
    return isinstance(x, Tensor) and x.dim() > 1 and vector.shape == (x.shape[-1],)
