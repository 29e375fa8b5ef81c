"""One generation request: its choices started, and gathered whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from fedpeft.serving import End, Piece
from fedpeft_client.serve.errors import ApiError
from fedpeft_client.serve.flow import Flow
from fedpeft_client.serve.metrics import Metrics
from fedpeft_client.serve.render import DONE, Gathered, Renderer, event, usage_of
from fedpeft_client.serve.schema import Common
from fedpeft_client.serve.targets import Target


@dataclass(frozen=True)
class Job:
    """What a body that came at ``began`` asks for: ``prompts`` in tokens, at most ``budget`` more, ``tops`` likeliest tokens reported."""

    body: Common
    target: Target
    prompts: Sequence[list[int]]
    budget: int | None
    tops: int | None
    chat: bool
    began: float

    @property
    def read(self) -> int:
        """Prompt tokens."""
        return sum(map(len, self.prompts))

    @property
    def choices(self) -> list[Gathered]:
        """Empty, one a choice."""
        return [Gathered() for _ in range(len(self.prompts) * self.body.copies)]


class Listener:
    """Takes a flow's events in, choice by choice, and counts the time to the first."""

    def __init__(self, flow: Flow, job: Job, metrics: Metrics) -> None:
        self.choices = job.choices
        self._flow, self._began, self._metrics = flow, job.began, metrics

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | End]]:
        """Every event, with the number of its choice."""
        first = True
        async for number, one in self._flow:
            if first:
                self._metrics.began(time.monotonic() - self._began)
                first = False
            assert isinstance(one, Piece | End)
            self.choices[number].add(one)
            yield number, one


async def gathered(flow: Flow, job: Job, metrics: Metrics) -> list[Gathered]:
    """Every choice, whole."""
    listener = Listener(flow, job, metrics)
    async for _ in listener:
        pass
    return listener.choices


async def streamed(flow: Flow, render: Renderer, job: Job, metrics: Metrics) -> AsyncIterator[bytes]:
    """Every event as it comes; a fault midway is the last event, in the shape of an error."""
    listener = Listener(flow, job, metrics)
    for number in range(len(listener.choices)):
        if (table := render.first(number)) is not None:
            yield event(table)
    try:
        async for number, one in listener:
            if (table := render.chunk(number, one)) is not None:
                yield event(table)
    except ApiError as fault:
        yield event(fault.body())
        return
    if job.body.wants_usage:
        yield event(render.last(usage_of(listener.choices, job.read)))
    yield DONE
