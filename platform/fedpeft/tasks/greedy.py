"""Greedy generation: deterministic, batched by prompt length, bounded; prompts are in the form of `encoding.opening`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedpeft.tasks.arrange import by_length
from fedpeft.tasks.encoding import pad_id, shorten, token_limit
from fedpeft.tasks.filled import device_of, padded
from fedpeft.tasks.likelihood import packs
from fedpeft.tasks.protocol import Ids

if TYPE_CHECKING:
    from fedpeft.bases import Base

BATCH = 16

Inputs = dict[str, torch.Tensor]
Settings = dict[str, Any]


def generate(model: Any, base: Base, prompts: Sequence[Ids], limit: int) -> list[str]:
    """The most likely continuation of each prompt, at most ``limit`` tokens, up to the end-of-text token.

    A prompt that leaves no room for ``limit`` tokens below the base's limit loses its beginning; an encoder has a limit of its own.
    """
    paired = base.family == "seq2seq"
    longest = token_limit(base)
    limit, room = (min(limit, longest), longest + 1) if paired else (limit, max(longest - limit, 1))
    cut = [shorten(ids.tolist(), room) for ids in prompts]
    answers = [""] * len(cut)
    for places in _groups([len(ids) for ids in cut], mixed=paired or packs(model)):
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

    inputs, special = (_read_apart if base.family == "seq2seq" else _read_on)(base, prompts, device_of(model))
    greedy = {"do_sample": False, "num_beams": 1, "use_cache": True, "max_new_tokens": limit}
    settings = GenerationConfig(**greedy, **special, pad_token_id=pad_id(base), eos_token_id=base.tokenizer.eos_token_id)
    before = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
    with torch.no_grad(), warnings.catch_warnings():
        # peft says so for every soft prompt; without padding the model's own positions are the right ones
        warnings.filterwarnings("ignore", "Position ids are not supported")
        out = model.generate(**inputs, generation_config=settings)
    texts: list[str] = base.tokenizer.batch_decode(out[:, before:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _read_on(base: Base, prompts: list[list[int]], device: torch.device) -> tuple[Inputs, Settings]:
    """Prompts padded at their start, to go on from their last tokens."""
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[pad_id(base)] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}, {}


def _read_apart(base: Base, prompts: list[list[int]], device: torch.device) -> tuple[Inputs, Settings]:
    """Prompts for the encoder, and the decoder's first token; what a checkpoint asks of summaries or translations is off."""
    first = prompts[0][-1]
    inputs = padded([torch.tensor(prompt[:-1]) for prompt in prompts], pad_id(base))
    inputs["decoder_input_ids"] = torch.full((len(prompts), 1), first)
    plain = {"decoder_start_token_id": first, "min_length": 0, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0}
    return {name: value.to(device) for name, value in inputs.items()}, plain
