"""A model that can be read: the next token is a function of the mixture and of every token so far, and rows are checked for order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from fedpeft.serving import End, Event, Failed, Piece, Request, Sampling, Scheduler

WORDS = 17
END = 0


def next_logits(mixture: Mapping[str, float], tokens: Sequence[int]) -> np.ndarray:
    seed = hashlib.sha256(repr((sorted(mixture.items()), tuple(tokens))).encode()).digest()
    return np.random.default_rng(list(seed)).normal(size=WORDS).astype(np.float32)


class OracleRows:
    """`Rows` whose state is the plain list of tokens of each seat; ``forwards`` keeps what every forward held."""

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self.seats: dict[int, tuple[Mapping[str, float], list[int]]] = {}
        self.forwards: list[list[tuple[int, int]]] = []
        self.opened = 0

    def open(self, mixture: Mapping[str, float]) -> int:
        self.opened += 1
        self.seats[self.opened] = (mixture, [])
        return self.opened

    def close(self, seat: int) -> None:
        del self.seats[seat]

    def reset(self) -> None:
        self.seats.clear()

    def forward(self, work: Sequence[tuple[int, Sequence[int]]]) -> np.ndarray:
        assert len({seat for seat, _ in work}) == len(work)
        for seat, tokens in work:
            assert tokens
            self.seats[seat][1].extend(tokens)
        self.forwards.append([(seat, len(tokens)) for seat, tokens in work])
        return np.stack([next_logits(*self.seats[seat]) for seat, _ in work])


class Letters:
    """A tokenizer of one character a token."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + i) for i in ids if i != END)


class Heard:
    """A sink that keeps what it was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        assert not self.done, "an event after the last one"
        self.events.append(event)

    @property
    def done(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], End | Failed)

    @property
    def tokens(self) -> list[int]:
        return [event.token.id for event in self.events if isinstance(event, Piece)]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece | End))


@pytest.fixture
def oracle() -> Callable[..., tuple[Scheduler, OracleRows]]:
    def make(whole: bool = False, **settings: Any) -> tuple[Scheduler, OracleRows]:
        rows = OracleRows(whole)
        return Scheduler(rows, Letters(), {END}, **settings), rows

    return make


@pytest.fixture
def ask() -> Callable[..., Request]:
    """A request and, as its sink, a `Heard`."""

    def make(prompt: Sequence[int], mixture: Mapping[str, float] | None = None, owner: object = None, **sampling: Any) -> Request:
        return Request(tuple(prompt), mixture or {}, Sampling(**{"temperature": 0.0, **sampling}), Heard(), owner)

    return make


@pytest.fixture
def alone(oracle: Any) -> Callable[[Request], Heard]:
    """What a request like this one hears when nothing else runs."""

    def run(request: Request) -> Heard:
        scheduler, _ = oracle()
        twin = Request(request.prompt, request.mixture, request.sampling, Heard())
        scheduler.submit(twin)
        while not scheduler.idle:
            scheduler.step()
        return twin.sink  # type: ignore[return-value]

    return run
