"""Turns of a chat: texts, and images that the request itself holds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

UNSAID: dict[str, tuple[Any, ...]] = {
    "name": (None,),
    "refusal": (None,),
    "audio": (None,),
    "annotations": (None, []),
    "function_call": (None,),
    "tool_calls": (None, []),
}
"""Fields of a message, of which nothing is said where they hold these values: clients send an answer's message back with all of them."""


class Link(BaseModel):
    """Where an image is: in the URL itself; no other is followed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class Part(BaseModel):
    """A part of a message: of text, or an image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Link | None = None

    @model_validator(mode="after")
    def _one(self) -> Part:
        if [name for name in ("text", "image_url") if getattr(self, name) is not None] != [self.type]:
            raise ValueError(f"a part of type {self.type} holds {self.type} and nothing else")
        return self


class Message(BaseModel):
    """One turn; parts of text are joined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @model_validator(mode="before")
    @classmethod
    def _said(cls, table: Any) -> Any:
        return {key: value for key, value in table.items() if value not in UNSAID.get(key, ())} if isinstance(table, dict) else table

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text or "" for part in self.content)

    @property
    def images(self) -> list[str]:
        """The URLs of its images."""
        return [] if isinstance(self.content, str) else [part.image_url.url for part in self.content if part.image_url is not None]

    def plain(self) -> dict[str, str]:
        """What chat templates take."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}
