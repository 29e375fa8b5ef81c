"""Greedy generation: deterministic, batched by prompt length, bounded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedpeft.tasks.arrange import by_length
from fedpeft.tasks.encoding import pad_id, shorten, token_limit
from fedpeft.tasks.likelihood import device_of, packs
from fedpeft.tasks.protocol import Ids

if TYPE_CHECKING:
    from fedpeft.bases import Base

BATCH = 16


def generate(model: Any, base: Base, prompts: Sequence[Ids], limit: int) -> list[str]:
    """The most likely continuation of each prompt, at most ``limit`` tokens, up to the end-of-text token.

    A prompt that leaves no room for ``limit`` tokens below the base's limit loses its beginning.
    """
    room = max(token_limit(base) - limit, 1)
    cut = [shorten(ids.tolist(), room) for ids in prompts]
    answers = [""] * len(cut)
    for places in _groups([len(ids) for ids in cut], mixed=packs(model)):
        for place, text in zip(places, _continue(model, base, [cut[place] for place in places], limit), strict=True):
            answers[place] = text
    return answers


def _groups(lengths: list[int], mixed: bool) -> Iterator[list[int]]:
    """Prompts to generate for together; of equal length unless ``mixed``, because padding would part a soft prompt from its text."""
    counts = np.array(lengths, np.int64)
    for places in [np.arange(len(counts))] if mixed else [np.flatnonzero(counts == length) for length in np.unique(counts)]:
        yield from (places[order].tolist() for order in by_length(counts[places], BATCH))


def _continue(model: Any, base: Base, prompts: list[list[int]], limit: int) -> list[str]:
    from transformers import GenerationConfig

    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[pad_id(base)] * (width - len(prompt)) + prompt for prompt in prompts], device=device_of(model))
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)
    end = base.tokenizer.eos_token_id
    settings = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, max_new_tokens=limit, pad_token_id=pad_id(base), eos_token_id=end
    )
    with torch.no_grad(), warnings.catch_warnings():
        # peft says so for every soft prompt; without padding the model's own positions are the right ones
        warnings.filterwarnings("ignore", "Position ids are not supported")
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    texts: list[str] = base.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]
