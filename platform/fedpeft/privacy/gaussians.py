"""Exact Gaussian noise on the integers from uniform 64-bit words: the discrete Gaussian, and the Gaussian rounded to an integer.

Both are drawn by one rejection: a table of slots proposes a block of integers, with a weight of whole slots just above the
block's share; the rest of the word picks an integer of the block and decides whether it stays. What float64 leaves open is
decided with decimals and as many fresh bits as it takes, so that no rounding error of ours reaches the distribution.

Discrete Gaussian: Canonne, Kamath and Steinke 2020 (arXiv 2004.00010). Where the sum to be hidden lies on the integers, the
rounded Gaussian is the continuous one processed afterwards, so that what holds for the continuous one holds for it, without
the leaks of floating-point samplers (Mironov 2012).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor, isfinite, log2

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError

Words = Callable[[int], NDArray[np.uint64]]
"""Gives so many independent uniform 64-bit words."""
Integers = NDArray[np.int64]
Bits = NDArray[np.uint64]

SLOT_BITS = 15
SLOTS = 1 << SLOT_BITS
REACH = 10.0
"""Standard deviations that blocks cover; the tail beyond goes on without end."""
FINE = 8
"""Blocks are between 1/16 and 1/8 of a standard deviation wide; those of the tail as many times wider."""
SIGMA_LIMIT = 2.0**30
SURE = 1e-11
"""More than float64 can be wrong about a probability, relatively."""
CHUNK = 1 << 15
"""Values per pass: what a pass reads and writes stays in the second-level cache."""


@dataclass(frozen=True, eq=False)
class Table:
    """Slots of a Gaussian of standard deviation ``sigma``; with ``spread`` an integer stands for its whole cell (the rounded one).

    ``blocks`` (SLOTS,) numbers each slot's block, from the most negative; the last two numbers are the tail and the blank slots.
    ``first`` is a block's smallest integer, ``weight`` its slots, ``squeeze`` the bits below which all its integers stay.
    An integer of a block stays with probability scale 2^shift exp(-x^2 / (2 sigma^2)) / weight.
    """

    sigma: float
    spread: bool
    shift: int
    scale: float
    blocks: NDArray[np.intp]
    first: Integers
    weight: Integers
    squeeze: Bits

    @property
    def left(self) -> int:
        """Bits of a word that remain for the decision."""
        return 64 - SLOT_BITS - self.shift

    @property
    def tail(self) -> int:
        """The tail's number among the blocks."""
        return len(self.first) - 2


@dataclass(frozen=True)
class Choice:
    """A proposed ``value`` that stays with probability ``factor`` exp(-y^2 / (2 sigma^2)); ``bits`` of the decision are ``count``.

    ``y`` is the value itself, or, in a rounded Gaussian, ``inside`` / 2^64 above the lower end of its cell.
    """

    value: int
    factor: Fraction
    bits: int
    count: int
    inside: int = 0


def discrete(words: Words, size: int, sigma: float) -> Integers:
    """``size`` values with probability proportional to exp(-x^2 / (2 sigma^2)). Raises `PrivacyError` on an impossible sigma."""
    return _draw(words, size, _table(_checked(sigma), False))


def rounded(words: Words, size: int, sigma: float) -> Integers:
    """``size`` values of N(0, sigma^2), each rounded to the nearest integer. Raises `PrivacyError` on an impossible sigma."""
    return _draw(words, size, _table(_checked(sigma), True))


def _checked(sigma: float) -> float:
    if not (isfinite(sigma) and 0.05 <= sigma <= SIGMA_LIMIT):
        raise PrivacyError(f"noise: a standard deviation of {sigma:g} steps is outside 0.05 to 2^30; choose another grid or clip")
    return float(sigma)


@lru_cache(maxsize=16)
def _table(sigma: float, spread: bool) -> Table:
    shift = max(0, floor(log2(sigma / FINE)))
    width, half = 1 << shift, 0.5 if spread else 0.0
    count = ceil(REACH * sigma / width) + 1
    first = np.arange(-count, count, dtype=np.int64) * width
    last = first + width - 1
    near = np.maximum(np.where(first >= 0, first, -last) - half, 0.0)
    far = np.where(first >= 0, last, -first) + half
    top, low = (np.exp(-0.5 * (ends / sigma) ** 2) for ends in (near, far))
    scale = (SLOTS - 2 * count - 2) / (width * float(top.sum()))
    weight = np.ceil(scale * width * top * (1 + SURE)).astype(np.int64)
    numbers = np.append(np.repeat(np.arange(2 * count), weight), 2 * count)
    blocks = np.concatenate([numbers, np.full(SLOTS - len(numbers), 2 * count + 1)])
    squeeze = np.floor(scale * width * low / weight * (1 - SURE) * 2.0 ** (64 - SLOT_BITS - shift)).astype(np.uint64)
    first, weight = np.append(first, [0, 0]), np.append(weight, [1, 1])
    return Table(sigma, spread, shift, scale, blocks, first, weight, np.append(squeeze, np.zeros(2, np.uint64)))


def _draw(words: Words, size: int, table: Table) -> Integers:
    out, done = np.empty(size, np.int64), 0
    while done < size:
        found = _pass(words, min(CHUNK, size - done), table)
        out[done : done + len(found)] = found
        done += len(found)
    return out


def _pass(words: Words, size: int, table: Table) -> Integers:
    """What stays of ``size`` proposals, in their order."""
    drawn = words(size)
    block = table.blocks[(drawn >> np.uint64(64 - SLOT_BITS)).view(np.int64)]
    values = table.first[block] + ((drawn >> np.uint64(table.left)) & np.uint64((1 << table.shift) - 1)).view(np.int64)
    bits = drawn & np.uint64((1 << table.left) - 1)
    stays = bits < table.squeeze[block]
    rest = np.flatnonzero(~stays & (block < table.tail))
    stays[rest] = _decided(words, table, values[rest], table.weight[block[rest]], bits[rest])
    for index in np.flatnonzero(block == table.tail):
        choice = _beyond(words, table)
        values[index], stays[index] = choice.value, _exactly(words, table, choice)
    return values[stays]


def _decided(words: Words, table: Table, values: Integers, weight: Integers, bits: Bits) -> NDArray[np.bool_]:
    """Which ``values`` stay, by float64 where it is sure."""
    inside = words(len(values)) if table.spread else np.zeros(len(values), np.uint64)
    at = (values + inside * 2.0**-64 - 0.5 if table.spread else values) / table.sigma
    chance = table.scale * 2.0 ** (table.shift + table.left) / weight * np.exp(-0.5 * at * at)
    stays: NDArray[np.bool_] = bits + 1.0 <= chance * (1 - SURE)
    for index in np.flatnonzero(~stays & (bits < chance * (1 + SURE))):
        factor = Fraction(table.scale) * 2**table.shift / int(weight[index])
        stays[index] = _exactly(words, table, Choice(int(values[index]), factor, int(bits[index]), table.left, int(inside[index])))
    return stays


def _beyond(words: Words, table: Table) -> Choice:
    """A proposal of the tail: blocks `FINE` times wider, each half as likely as the one before, on either side."""
    sign, place = (int(word) for word in words(2))
    number, width = 0, FINE << table.shift
    while int(words(1)[0]) & 1:
        number += 1
    start = len(table.first[:-2]) // 2 * (1 << table.shift) + number * width + place % width
    factor = Fraction(table.scale) * width * 2 ** (number + 2)
    return Choice(start if sign & 1 else -1 - start, factor, 0, 0, int(words(1)[0]))


def _exactly(words: Words, table: Table, choice: Choice) -> bool:
    """Whether ``choice`` stays, with 64 more bits of everything until it is certain."""
    bits, inside, more = choice.bits, choice.inside, 0
    while True:
        more += 64
        bits, inside = (part << 64 | int(word) for part, word in zip((bits, inside), words(2), strict=True))
        low, high = _bounds(table, choice, inside, 64 + more)
        if Fraction(bits + 1, 1 << (choice.count + more)) <= low:
            return True
        if Fraction(bits, 1 << (choice.count + more)) >= high:
            return False


def _bounds(table: Table, choice: Choice, inside: int, count: int) -> tuple[Fraction, Fraction]:
    """Bounds of the probability that ``choice`` stays, ``inside`` being known to ``count`` bits."""
    digits = 40 + count // 3
    start, width = Fraction(choice.value), Fraction(0)
    if table.spread:
        start, width = start - Fraction(1, 2) + Fraction(inside, 1 << count), Fraction(1, 1 << count)
    near, far = sorted((abs(start), abs(start + width)))
    near = Fraction(0) if start < 0 < start + width else near
    low, high = (choice.factor * _bell(end / Fraction(table.sigma), digits) for end in (far, near))
    slack = Fraction(1, 10 ** (digits - 10))
    return low * (1 - slack), high * (1 + slack)


def _bell(at: Fraction, digits: int) -> Fraction:
    """exp(-at^2 / 2) to ``digits`` digits, or to a few less where its power is large."""
    power = -at * at / 2
    with localcontext(prec=digits):
        return Fraction((Decimal(power.numerator) / Decimal(power.denominator)).exp())
