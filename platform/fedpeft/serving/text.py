"""Tokens to text as they come: only text that no later token can change, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TAIL = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character yet."""


class TextStream:
    """One request's text; the pieces that `push` and `close` give, one after the other, are the text of all its tokens.

    A window of the last tokens is decoded with and without the new one, so that spaces and merges at the seam come out as in the whole.
    (Bytes that make no character are the exception: a byte-fallback tokenizer marks the good ones before them as bad too, afterwards.)
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._begin = self._read = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after ``token``."""
        self._ids.append(token)
        before, after = self._decode(self._begin, self._read), self._decode(self._begin, len(self._ids))
        if len(after) <= len(before) or after.endswith(TAIL):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :])

    def close(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        rest = self._decode(self._begin, len(self._ids))[len(self._decode(self._begin, self._read)) :]
        text = self._release(rest) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True))

    def _release(self, fresh: str) -> str:
        """Cut at the first stop string; hold back what may be the beginning of one."""
        text = self._held + fresh
        found = [place for place in (text.find(word) for word in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, word: str) -> int:
    """How many last characters of ``text`` are the first of ``word``."""
    return next((size for size in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:size])), 0)
