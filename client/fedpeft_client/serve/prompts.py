"""Bodies to token ids, within the context. All but `fitted` run inside `Backend.read`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError

from fedpeft.serving.backend import Backend
from fedpeft.serving.oneshot import Seen
from fedpeft_client.serve.errors import invalid
from fedpeft_client.serve.flow import Wanted
from fedpeft_client.serve.schema import Chat
from fedpeft_client.serve.targets import Target

if TYPE_CHECKING:
    from fedpeft_client.serve.generating import Job


class Read(NamedTuple):
    """A prompt in both forms."""

    text: str
    ids: list[int]


def chat_prompt(backend: Backend, target: Target, body: Chat) -> list[int]:
    """A lone message to a task that was not trained on chats is asked as the task's rows ask; all else goes through the chat template."""
    messages = [message.plain() for message in body.messages]
    lone = len(messages) == 1 and target.served is not None and not getattr(target.served.task, "chat", False)
    try:
        return backend.prompt(messages[0]["content"] if lone else messages)
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as fault:
        raise invalid(f"the base's chat template takes no such messages: {str(fault)[:200]}", "messages") from None


def of_prompt(backend: Backend, given: str | list[int]) -> Read:
    """A text or its tokens, to be continued. Raises `ApiError` when a token is none of the base's."""
    if isinstance(given, str):
        return Read(given, backend.begun(given))
    _known(given, backend.vocabulary, "prompt")
    return Read(backend.text(given), given)


def of_input(backend: Backend, given: str | list[int]) -> list[int] | Seen:
    """A text or its tokens, or an image, to be embedded. Raises `ApiError` when a token is none of the base's, or they are too many."""
    ids = backend.read_in(given, cut=False) if isinstance(given, str) else given
    if isinstance(ids, Seen):
        return ids
    _known(ids, backend.vocabulary, "input")
    if len(ids) > backend.context:
        raise invalid(f"the base takes {backend.context} tokens, a text has {len(ids)}; split it", "input", "context_length_exceeded")
    return ids


def fitted(job: Job, backend: Backend, limit: int) -> list[Wanted]:
    """Every choice with what it may generate. Raises `ApiError` when prompt and answer do not fit the context, or the answer the limit."""
    found, choices = [], len(job.prompts) * job.body.copies
    _known(job.body.logit_bias or {}, backend.vocabulary)
    for ids in job.prompts:
        room = backend.room(len(ids))
        asked = min(room, max(limit // choices, 1)) if job.budget is None else job.budget
        if room < 1 or asked > room:
            raise invalid(
                f"the base takes {backend.context} tokens{' on each side' if backend.apart else ''}; the prompt has {len(ids)} "
                f"and max_tokens is {job.budget}; shorten one of them",
                "messages" if job.chat else "prompt",
                "context_length_exceeded",
            )
        if asked * choices > limit:
            raise invalid(
                f"max_tokens is {asked} for each of {choices} choices; this server generates at most {limit} a request, in all choices",
                "max_tokens",
                "invalid_value",
            )
        found += [Wanted(tuple(ids), job.body.sampling(asked, copy, job.tops)) for copy in range(job.body.copies)]
    return found


def _known(tokens: Iterable[int], size: int, name: str = "logit_bias") -> None:
    wrong = [token for token in tokens if not 0 <= token < size]
    if wrong:
        raise invalid(f"token {wrong[0]} is none of the base's, which has {size}", name, "invalid_value")
