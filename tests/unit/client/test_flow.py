"""A caller who reads slowly keeps a text, not a queue of its pieces; tokens with log-probabilities are all kept."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from fedpeft.serving import End, Failed, Piece, Request, Sampling, Token
from fedpeft_client.serve.errors import ApiError
from fedpeft_client.serve.flow import Flow, Wanted

CHOICES = 3


def read(logprob: float | None, pieces: int = 500, fault: bool = False) -> tuple[list[tuple[int, Any]], int]:
    """What a reader hears who begins when all has been said, and how many events waited for it."""

    async def run() -> tuple[list[tuple[int, Any]], int]:
        said: list[Request] = []
        flow = Flow(
            SimpleNamespace(catalog=SimpleNamespace(share=dict), submit=said.append),  # type: ignore[arg-type]
            [Wanted((1,), Sampling())] * CHOICES,
            {},
        )
        assert {id(request.owner) for request in said} == {id(flow)}
        for place in range(pieces):
            for request in said:
                request.sink(Piece(Token(place, logprob), chr(97 + place % 26)))
        for request in said:
            request.sink(Failed("it broke") if fault else End("!", "length", 1, pieces))
        await asyncio.sleep(0.01)
        waited = sum(map(len, flow._unread.values()))
        return [one async for one in flow], waited

    return asyncio.run(run())


@pytest.mark.parametrize(("logprob", "most"), [(None, 2 * CHOICES), (-0.5, 501 * CHOICES)])
def test_unread_pieces_become_one_text(logprob, most):
    found, waited = read(logprob)
    assert waited == most
    for choice in range(CHOICES):
        events = [event for number, event in found if number == choice]
        assert "".join(event.text for event in events) == "".join(chr(97 + place % 26) for place in range(500)) + "!"
        assert [isinstance(event, End) for event in events] == [False] * (len(events) - 1) + [True]


def test_a_failure_is_told():
    with pytest.raises(ApiError, match="it broke; ask again"):
        read(None, fault=True)
