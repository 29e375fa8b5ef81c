"""Who runs now: requests join and leave the batch at any token, prompts are read in bounded bites, the queue is bounded.

Pure policy over a `Rows` (the model's side), so that its laws are tested without a model.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.serving.requests import End, Event, Failed, Mixture, OverloadedError, Piece, Reason, Request
from fedpeft.serving.sampling import Sampler
from fedpeft.serving.text import TextStream


class Rows(Protocol):
    """The model's side: `Decoder`, or a test's oracle. ``whole`` says that a prompt is read in one step, as an encoder must."""

    whole: bool

    def open(self, mixture: Mixture) -> Any:
        """A place for a new row."""
        ...

    def close(self, seat: Any) -> None:
        """Free it."""
        ...

    def reset(self) -> None:
        """Free all."""
        ...

    def forward(self, work: Sequence[tuple[Any, Sequence[int]]]) -> NDArray[np.float32]:
        """Logits (N, V) after each row's next tokens."""
        ...


@dataclass(frozen=True)
class Limits:
    """``rows`` run at once, ``queue`` more wait; at most ``bite`` prompt tokens, or one prompt where prompts are read whole, in a step.

    ``alike`` lets only rows of one mixture run together, from the whole queue: how one-adapter-at-a-time servers work, for comparison.
    """

    rows: int = 32
    queue: int = 256
    bite: int = 512
    alike: bool = False


@dataclass
class Counts:
    """What happened since the start."""

    steps: int = 0
    row_steps: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


@dataclass(eq=False)
class _Running:
    request: Request
    seat: Any
    sampler: Sampler
    stream: TextStream
    due: list[int]
    """Tokens that the model has not seen: the rest of the prompt, then the last token."""
    made: int = 0


@dataclass
class Scheduler:
    """Waiting and running requests; `step` does one round of bites and tokens. One thread calls all of it."""

    rows: Rows
    tokenizer: Any
    ends: Collection[int]
    limits: Limits = Limits()
    released: Callable[[Request], None] = lambda request: None
    counts: Counts = field(default_factory=Counts)
    waiting: deque[Request] = field(default_factory=deque)
    running: list[_Running] = field(default_factory=list)

    def require_room(self, coming: int = 0) -> None:
        """Raise `OverloadedError` when running, waiting and ``coming`` requests are all that is allowed."""
        load = len(self.running) + len(self.waiting) + coming
        if load >= self.limits.rows + self.limits.queue:
            raise OverloadedError(
                f"{load} requests run or wait, which is all that is allowed; ask again later",
                retry_after=1 + self.limits.queue // max(self.limits.rows, 1),
            )

    def submit(self, request: Request) -> None:
        """Queue ``request``. Raises `OverloadedError` when the queue is full."""
        self.require_room()
        self.waiting.append(request)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def step(self) -> None:
        """Drop who left, admit who waits, read a bite of prompts, then one token for every row that has read its prompt."""
        self._sweep()
        self._admit()
        ready = [row for row in self.running if len(row.due) == 1 and row.made]
        self._read([row for row in self.running if not row.made])
        self._decode([(row, row.due) for row in ready])
        self.counts.steps += bool(self.running)

    def fail(self, message: str) -> None:
        """End every running request with ``message``; those that wait stay."""
        for row in self.running:
            row.request.sink(Failed(message))
            self.released(row.request)
            self.counts.failed += 1
        self.running.clear()
        self.rows.reset()

    def abort(self, message: str) -> None:
        """End everything."""
        self.fail(message)
        while self.waiting:
            request = self.waiting.popleft()
            request.sink(Failed(message))
            self.released(request)

    def _sweep(self) -> None:
        for row in [row for row in self.running if row.request.gone.is_set()]:
            self._end(row, "cancelled", "")
        left = [request for request in self.waiting if request.gone.is_set()]
        for request in left:
            self.waiting.remove(request)
            self.counts.cancelled += 1
            request.sink(End("", "cancelled", len(request.prompt), 0))
            self.released(request)

    def _admit(self) -> None:
        while len(self.running) < self.limits.rows and (request := self._next()) is not None:
            self.waiting.remove(request)
            stream = TextStream(self.tokenizer, request.sampling.stop)
            seat = self.rows.open(request.mixture)
            self.running.append(_Running(request, seat, Sampler(request.sampling), stream, list(request.prompt)))

    def _next(self) -> Request | None:
        """The first to come of those whose owner has the fewest running rows, so that nobody's many hold up another's few."""
        shares = Counter(id(row.request.owner) for row in self.running)
        return min(filter(self._fits, self.waiting), key=lambda request: shares[id(request.owner)], default=None)

    def _fits(self, request: Request) -> bool:
        return not self.limits.alike or all(dict(row.request.mixture) == dict(request.mixture) for row in self.running)

    def _read(self, rows: list[_Running]) -> None:
        """The next bite of prompts, first come first served."""
        left = self.limits.bite
        work: list[tuple[_Running, list[int]]] = []
        for row in rows:
            bite = row.due if self.rows.whole else row.due[:left]
            if (work and len(bite) > left) or left <= 0:
                break
            work.append((row, bite))
            left -= len(bite)
        self.counts.prompt_tokens += self.limits.bite - left
        self._decode(work)

    def _decode(self, work: list[tuple[_Running, list[int]]]) -> None:
        if not work:
            return
        logits = self.rows.forward([(row.seat, tokens) for row, tokens in work])
        likeliest = logits.argmax(1).tolist()
        self.counts.row_steps += len(work)
        for place, (row, tokens) in enumerate(work):
            row.due = row.due[len(tokens) :]
            if not row.due:
                self._extend(row, logits[place], likeliest[place])

    def _extend(self, row: _Running, logits: NDArray[np.float32], likeliest: int) -> None:
        token = row.sampler.choose(logits, likeliest)
        row.made += 1
        row.due = [token.id]
        self.counts.completion_tokens += 1
        if token.id in self.ends and not row.request.sampling.endless:
            return self._end(row, "stop", row.stream.close())
        row.request.sink(Piece(token, row.stream.push(token.id)))
        if row.stream.stopped:
            return self._end(row, "stop", "")
        if row.made >= row.request.sampling.max_tokens:
            return self._end(row, "length", row.stream.close())
        return None

    def _end(self, row: _Running, reason: Reason, text: str) -> None:
        reason = "stop" if row.stream.stopped and reason == "length" else reason
        self.running.remove(row)
        self.rows.close(row.seat)
        self.counts.cancelled += reason == "cancelled"
        self.counts.finished += reason != "cancelled"
        event: Event = End(text, reason, len(row.request.prompt), row.made)
        row.request.sink(event)
        self.released(row.request)
