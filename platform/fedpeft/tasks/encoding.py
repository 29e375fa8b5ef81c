"""Text to token ids: prompts and completions for a base that writes, cut to its limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.errors import BaseError
from fedpeft.tasks.forms import Messages, Pair
from fedpeft.tasks.protocol import Ids

if TYPE_CHECKING:
    from fedpeft.bases import Base


def require_writer(base: Base, kind: str) -> None:
    """Raise `BaseError` unless ``base`` writes text: a causal language model, or an encoder-decoder."""
    if base.family not in ENCODERS:
        raise BaseError(
            f"{kind}: base {base.spec.model} is of family {base.family!r}; "
            "give a causal language model or an encoder-decoder, or use classification"
        )


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

    Too long a prompt loses its beginning (but for the first token), too long a completion its end.
    """
    prompt, ending = ENCODERS[base.family](base, pair)
    return np.asarray(prompt + ending, np.int32), len(prompt)


def opening(base: Base, prompt: str | Messages) -> Ids:
    """What is read before the first word of an answer to ``prompt``, in the form of `encode_pair`."""
    first = [base.before(_target_ids(base, ""))] if base.family == "seq2seq" else []
    return np.asarray(prompt_ids(base, prompt) + first, np.int32)


def ended(base: Base, ids: list[int]) -> list[int]:
    """``ids`` with exactly one end token, as an encoder-decoder's classifier needs it: the last one, or one at the end."""
    end = int(base.config.eos_token_id)
    places = [place for place, token in enumerate(ids) if token == end]
    if not places:
        return [*ids[: token_limit(base) - 1], end]
    return [token for place, token in enumerate(ids) if token != end or place == places[-1]]


def _causal(base: Base, pair: Pair) -> tuple[list[int], list[int]]:
    """Both in one sequence; half of the limit is the completion's at least."""
    prompt, ending = prompt_ids(base, pair.prompt), _completion_ids(base, pair)
    limit = token_limit(base)
    ending = ending[: max(limit - len(prompt), limit // 2, 1)]
    return shorten(prompt, max(limit - len(ending), 1)), ending


def _seq2seq(base: Base, pair: Pair) -> tuple[list[int], list[int]]:
    """The encoder's tokens and the decoder's first; the labels. Each half may be as long as the limit."""
    limit, labels = token_limit(base), _target_ids(base, pair.completion)
    return [*shorten(prompt_ids(base, pair.prompt), limit), base.before(labels)], labels[:limit]


def shorten(ids: list[int], limit: int) -> list[int]:
    """At most ``limit`` ids: the first one (the beginning-of-text token, where there is one) and the last ones."""
    return ids if len(ids) <= limit else ids[:1] + ids[len(ids) - limit + 1 :]


def prompt_ids(base: Base, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt, with the tokenizer's own beginning, for an encoder its end too; never empty."""
    tokenizer = base.tokenizer
    if isinstance(prompt, list) and getattr(tokenizer, "chat_template", None):
        ids = _ids(tokenizer, _templated(tokenizer, prompt, generation=True), special=False)
    elif base.family == "seq2seq":
        ids = _ids(tokenizer, prompt if isinstance(prompt, str) else _plain(prompt), special=True)
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


def _target_ids(base: Base, completion: str) -> list[int]:
    """What the decoder has to say, with the tokenizer's own marks of a target (BART's beginning, mBART's language) and an end token."""
    tokenizer = base.tokenizer
    ids = [int(i) for i in tokenizer(text_target=completion, verbose=False)["input_ids"]]
    end = tokenizer.eos_token_id
    return ids if end is None or end in ids else [*ids, int(end)]


def _plain(prompt: str | Messages) -> str:
    if isinstance(prompt, list):
        return "".join(f"{turn['role']}: {turn['content']}\n" for turn in prompt) + "assistant:"
    return prompt + "\n" if prompt else ""


def _templated(tokenizer: Any, messages: Messages, generation: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]


ENCODERS: dict[str, Callable[[Base, Pair], tuple[list[int], list[int]]]] = {"causal": _causal, "seq2seq": _seq2seq}
"""From a pair to what is read before the first label, and the labels, by family of the base."""
