"""Text to token ids: prompts and completions for a causal base, cut to its limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.errors import BaseError
from fedpeft.tasks.forms import Messages, Pair
from fedpeft.tasks.protocol import Ids

if TYPE_CHECKING:
    from fedpeft.bases import Base


def require_causal(base: Base, kind: str) -> None:
    """Raise `BaseError` unless ``base`` is a causal language model."""
    if base.family != "causal":
        raise BaseError(f"{kind}: base {base.spec.model} is of family {base.family!r}; give a causal language model, or use classification")


def token_limit(base: Base) -> int:
    """The most tokens of a sequence: the base's setting, or the model's own context where that is less."""
    context = getattr(base.config, "max_position_embeddings", None)
    return min(base.spec.max_tokens, context) if isinstance(context, int) and context > 0 else base.spec.max_tokens


def pad_id(base: Base) -> int:
    """The token id that fills up shorter sequences; the end-of-text token where the tokenizer has no padding token."""
    found = base.tokenizer.pad_token_id
    return int(found if found is not None else base.tokenizer.eos_token_id or 0)


def encode_pair(base: Base, pair: Pair) -> tuple[Ids, int]:
    """Token ids (T,) of prompt, completion and end token, and the position where the completion starts.

    Too long a prompt loses its beginning (but for the first token), too long a completion its end; half of the limit is the
    completion's at least.
    """
    prompt, ending = prompt_ids(base, pair.prompt), _completion_ids(base, pair)
    limit = token_limit(base)
    ending = ending[: max(limit - len(prompt), limit // 2, 1)]
    prompt = shorten(prompt, max(limit - len(ending), 1))
    return np.asarray(prompt + ending, np.int32), len(prompt)


def shorten(ids: list[int], limit: int) -> list[int]:
    """At most ``limit`` ids: the first one (the beginning-of-text token, where there is one) and the last ones."""
    return ids if len(ids) <= limit else ids[:1] + ids[len(ids) - limit + 1 :]


def prompt_ids(base: Base, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt, with the tokenizer's own beginning; never empty."""
    tokenizer = base.tokenizer
    if isinstance(prompt, list) and getattr(tokenizer, "chat_template", None):
        ids = _ids(tokenizer, _templated(tokenizer, prompt, generation=True), special=False)
    else:
        ids = _ids(tokenizer, _plain(prompt), special=True)
        ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    return ids or [next(int(i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)]


def _completion_ids(base: Base, pair: Pair) -> list[int]:
    tokenizer = base.tokenizer
    if isinstance(pair.prompt, list) and getattr(tokenizer, "chat_template", None):
        before = _templated(tokenizer, pair.prompt, generation=True)
        whole = _templated(tokenizer, [*pair.prompt, {"role": "assistant", "content": pair.completion}], generation=False)
        if whole.startswith(before) and len(whole) > len(before):
            return _ids(tokenizer, whole[len(before) :], special=False)
    ending = [int(tokenizer.eos_token_id)] if tokenizer.eos_token_id is not None else []
    return _ids(tokenizer, pair.completion, special=False) + ending


def _plain(prompt: str | Messages) -> str:
    if isinstance(prompt, list):
        return "".join(f"{turn['role']}: {turn['content']}\n" for turn in prompt) + "assistant:"
    return prompt + "\n" if prompt else ""


def _templated(tokenizer: Any, messages: Messages, generation: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]
