"""Answers as OpenAI's JSON."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedpeft.serving import End, Piece, Token

Decode = Callable[[Sequence[int]], str]


@dataclass
class Gathered:
    """One choice as it comes."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None
    made: int = 0
    read: int = 0

    def add(self, event: Piece | End) -> None:
        """Take an event in."""
        self.text += event.text
        if isinstance(event, Piece):
            self.tokens.append(event.token)
        else:
            self.reason, self.read, self.made = event.reason, event.prompt_tokens, event.completion_tokens


@dataclass(frozen=True)
class Renderer:
    """The form of one response: ``chat`` or plain completions; ``said`` is the ``fedpeft`` field, ``decode`` writes single tokens."""

    chat: bool
    model: str
    said: Mapping[str, Any]
    decode: Decode
    logprobs: bool = False
    counted: bool = False
    """Whether a stream tells its usage: then every chunk has the field, and the last one a value."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Gathered], usage: Mapping[str, int]) -> dict[str, Any]:
        """A response that is not streamed."""
        rows = [self._choice(place, choice) for place, choice in enumerate(choices)]
        return {**self._head("chat.completion"), "choices": rows, "usage": dict(usage), "fedpeft": dict(self.said)}

    def first(self, number: int) -> dict[str, Any] | None:
        """The chunk that opens a streamed choice of a chat."""
        return self._chunk(number, {"role": "assistant", "content": ""}, None, []) | {"fedpeft": dict(self.said)} if self.chat else None

    def chunk(self, number: int, event: Piece | End) -> dict[str, Any] | None:
        """One event of a streamed choice; None where there is nothing to tell."""
        tokens = [event.token] if isinstance(event, Piece) and self.logprobs else []
        reason = event.reason if isinstance(event, End) else None
        if not event.text and not tokens and reason is None:
            return None
        body = {"content": event.text} if self.chat and event.text else {} if self.chat else {"text": event.text}
        return self._chunk(number, body, reason, tokens) | ({} if self.chat else {"fedpeft": dict(self.said)})

    def last(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": dict(usage)}

    def _head(self, kind: str) -> dict[str, Any]:
        name, noun = ("chatcmpl-", kind) if self.chat else ("cmpl-", "text_completion")
        return {"id": name + self.id, "object": noun, "created": self.created, "model": self.model}

    def _choice(self, place: int, choice: Gathered) -> dict[str, Any]:
        found: dict[str, Any] = {"index": place, "finish_reason": choice.reason, "logprobs": self._logprobs(choice.tokens)}
        if self.chat:
            return found | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return found | {"text": choice.text}

    def _chunk(self, number: int, body: dict[str, Any], reason: str | None, tokens: list[Token]) -> dict[str, Any]:
        row: dict[str, Any] = {"index": number, "finish_reason": reason, "logprobs": self._logprobs(tokens)}
        empty = {"usage": None} if self.counted else {}
        return {**self._head("chat.completion.chunk"), "choices": [row | ({"delta": body} if self.chat else body)], **empty}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            return {"content": [self._token(t.id, t.logprob) | {"top_logprobs": [self._token(*top) for top in t.top]} for t in tokens]}
        return {
            "tokens": [self.decode([token.id]) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.decode([place]): value for place, value in token.top} for token in tokens],
        }

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage_of(choices: Sequence[Gathered], read: int) -> dict[str, int]:
    """Tokens used: prompts are counted once however many choices are made of one."""
    made = sum(choice.made for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def event(table: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def replayed(render: Renderer, choices: Sequence[Gathered], usage: Mapping[str, int], wants_usage: bool) -> AsyncIterator[bytes]:
    """An answer that is there already, as a stream."""
    for number, choice in enumerate(choices):
        for table in (render.first(number), render.chunk(number, End(choice.text, "stop", 0, choice.made))):
            if table is not None:
                yield event(table)
    if wants_usage:
        yield event(render.last(usage))
    yield DONE
