"""Bodies of the OpenAI API that are understood here; what is not understood is refused by name, never silently dropped."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fedpeft.serving import Sampling
from fedpeft_client.serve.errors import ApiError, invalid
from fedpeft_client.serve.messages import Message

Body = TypeVar("Body", bound=BaseModel)
Ids = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
Stop = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
    BeforeValidator(lambda value: () if value is None else (value,) if isinstance(value, str) else value),
    Field(max_length=4),
]
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
    "dimensions": (None,),
    "service_tier": (None, "auto", "default"),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "moderation": (None,),
    "safety_identifier": (None,),
    "prompt_cache_key": (None,),
    "prompt_cache_options": (None,),
    "prompt_cache_retention": (None,),
}
"""Fields of the API that only their neutral values are accepted of: anything else would change the answer, and cannot be had here."""
IGNORED = frozenset({"user", "metadata", "store"})
"""Fields that do not change what is answered, and that nothing here keeps."""


class Ours(BaseModel):
    """What only this server knows: an explicit mixture of tasks with their weights, in place of the model's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mixture: dict[str, Annotated[float, Field(ge=-16, le=16, allow_inf_nan=False)]] = Field(min_length=1, max_length=16)


class StreamOptions(BaseModel):
    """``include_usage`` adds a last chunk with the usage; nothing is obfuscated, as OpenAI's streams are unless that is declined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


class Common(BaseModel):
    """What chat and plain completions share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, max_length=256)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = ()
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] | None = None
    fedpeft: Ours | None = None

    @property
    def copies(self) -> int:
        """``n``."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise clash("stream_options", "it needs stream = true")
        return self

    def sampling(self, max_tokens: int, copy: int, top_logprobs: int | None) -> Sampling:
        """Settings of the ``copy``-th choice; the API's defaults where nothing is said."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else (self.seed + copy) % 2**64,
            stop=self.stop,
            top_logprobs=top_logprobs,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
        )


class Chat(Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Chat:
        if self.top_logprobs is not None and not self.logprobs:
            raise clash("top_logprobs", "it needs logprobs = true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise clash("max_tokens", f"is {self.max_tokens} and max_completion_tokens is {self.max_completion_tokens}; send one of them")
        if not any(message.role == "user" for message in self.messages):
            raise clash("messages", "there is none of the role 'user'")
        if sum(len(message.images) for message in self.messages) > 1:
            raise clash("messages", "there are several images, and one a request is answered; send several requests")
        return self

    @property
    def budget(self) -> int | None:
        """Most tokens to generate, where it is said."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def tops(self) -> int | None:
        """How many likeliest tokens to report, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def image(self) -> str | None:
        """The URL of the request's image, where it has one."""
        return next((url for message in self.messages for url in message.images), None)

    @property
    def asked(self) -> str:
        """The request's image, or else the last message of the user: what is routed and classified."""
        if self.image is not None:
            return self.image
        return next(message.text for message in reversed(self.messages) if message.role == "user")


class Completion(Common):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def tops(self) -> int | None:
        """As a chat's."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one a choice."""
        return several(self.prompt)


class Embeddings(BaseModel):
    """POST /v1/embeddings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, max_length=256)
    input: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    fedpeft: Ours | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts, one an embedding."""
        return several(self.input)


def several(value: Any) -> list[str | list[int]]:
    """A text or its tokens, or a list of such, as a list."""
    return [value] if isinstance(value, str) or isinstance(value[0], int) else list(value)


def parse(raw: bytes, body: type[Body]) -> Body:
    """Read a request's body. Raises `ApiError` (400) naming the field, the value and what is allowed."""
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as fault:
        raise invalid(f"the body is not JSON: {str(fault)[:120]}") from None
    if not isinstance(table, dict):
        raise invalid(f"the body is a JSON {type(table).__name__}; it must be an object")
    try:
        return body.model_validate(_understood(table, body))
    except ValidationError as faults:
        raise _fault(faults, body) from None


def _understood(table: dict[str, Any], body: type[BaseModel]) -> dict[str, Any]:
    for name, allowed in NEUTRAL.items():
        if name in table and name not in body.model_fields and table[name] not in allowed:
            said = [repr(value) for value in allowed if value]
            others = f" or send {' or '.join(said)}" if said else ""
            raise invalid(f"{name} is not supported by this server; leave it out{others}", name, "unsupported_parameter")
    skipped = (IGNORED | set(NEUTRAL)) - set(body.model_fields)
    return {name: value for name, value in table.items() if name not in skipped}


def clash(param: str, message: str) -> PydanticCustomError:
    """A field that others forbid."""
    return PydanticCustomError("clash", message, {"param": param})


def _fault(faults: ValidationError, body: type[BaseModel]) -> ApiError:
    """The fault of the innermost field, which of several allowed forms is the one that was meant."""
    first = max(faults.errors(include_url=False), key=lambda fault: len(fault["loc"]))
    parts = [str(part) for part in first["loc"] if not (isinstance(part, str) and ("[" in part or part in ("str", "float")))]
    name = ".".join(parts) or first.get("ctx", {}).get("param")
    if first["type"] == "extra_forbidden":
        known = f"; known are {sorted(body.model_fields)}" if len(parts) == 1 else ""
        return invalid(f"unrecognized request argument supplied: {name}{known}", name, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"you must provide {name}", name, "missing_required_parameter")
    seen = repr(first["input"])
    shown = "" if isinstance(first["input"], dict | list) else f" (got {seen if len(seen) <= 80 else seen[:79] + '…'})"
    return invalid(f"{name or 'the body'}: {first['msg'].removeprefix('Value error, ')}{shown}", name, "invalid_value")
