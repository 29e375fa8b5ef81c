"""What a caller asks of the engine and what comes back: plain values, no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fedpeft.errors import FedpeftError

if TYPE_CHECKING:
    from fedpeft.mixtures import Gates

Mixture = Mapping[str, float]
"""Name of an adapter -> its weight; empty is the base alone."""
Reason = Literal["stop", "length", "cancelled"]


class TokenMixture(dict[str, float]):
    """A mixture that every token at every module weighs anew, by ``gates``; its weights are the means over the prompt, for people."""

    def __init__(self, weights: Mapping[str, float], gates: Gates) -> None:
        super().__init__(weights)
        self.gates = gates


class OverloadedError(FedpeftError):
    """The queue is full; ``retry_after`` (seconds) says when asking again may help."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(FedpeftError):
    """The engine is stopping or broke down; nothing is accepted any more."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, by the names of the OpenAI API.

    ``temperature`` 0 is greedy. ``seed`` makes a request's draws its own, whatever runs beside it. ``top_logprobs`` is how many
    of the likeliest tokens are reported beside the chosen one, None for none. ``endless`` goes on past the end token.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    endless: bool = False

    @property
    def plain(self) -> bool:
        """Whether the next token is the likeliest one and nothing else is asked."""
        return not (self.temperature or self.logit_bias or self.presence_penalty or self.frequency_penalty or self.top_logprobs is not None)


@dataclass(frozen=True)
class Token:
    """One generated token; ``logprob`` and ``top`` (id, log-probability in nats) where they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """One step of a request: its token, and the text that it completed (often none, while a stop string may still come)."""

    token: Token
    text: str


@dataclass(frozen=True)
class End:
    """The last event: text that was held back, why it ended, and what was used."""

    text: str
    reason: Reason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """The last event of a request that the engine could not finish."""

    message: str


Event = Piece | End | Failed


@dataclass(eq=False)
class Request:
    """One generation: prompt ids, adapters, sampling; ``sink`` gets its events on the engine's thread and must not block.

    Requests of one ``owner`` wait for each other: a free place goes to the owner who has the fewest.
    """

    prompt: tuple[int, ...]
    mixture: Mixture
    sampling: Sampling
    sink: Callable[[Event], None]
    owner: object = None
    gone: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """The caller left: its place in queue or batch is freed at the next step. Any thread."""
        self.gone.set()
