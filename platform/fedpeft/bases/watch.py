"""What the bare base's modules read, token by token: what gates, Arrow and SpectR look at."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.bases.base import Base
from fedpeft.bases.embed import evaluating, tokens
from fedpeft.bases.spec import LAST
from fedpeft.bases.vision import tokens_of
from fedpeft.errors import AdapterError

States = dict[str, NDArray[np.float32]]


def watch(base: Base, text: str, modules: Collection[str]) -> States:
    """The inputs (N, n) float32 of ``modules`` for the N tokens of ``text``, or of the image it is; of `LAST` what its reader says.

    An encoder-decoder's decoder has read its first token alone, as it has when a request comes: 1 row for its modules.

    Raises:
        BaseError: an adapter is attached; what the base reads must not depend on it.
        AdapterError: the base has no such module.
    """
    base.require_free("watch")
    return states(base, text, modules)


def states(base: Base, text: str, modules: Collection[str]) -> States:
    """`watch` where the caller knows that what is attached acts on no row. Raises `AdapterError` when the base has no such module."""
    inputs = _inputs(base, text)
    with torch.no_grad(), evaluating(base.trunk), watching(base.model, set(modules) - {LAST}) as seen:
        out = base.trunk(**inputs)
        if LAST in modules:
            seen[LAST] = out.encoder_last_hidden_state if "decoder_input_ids" in inputs else tokens_of(out[0])
    return {module: states.float().flatten(0, -2).cpu().numpy() for module, states in seen.items()}


def _inputs(base: Base, text: str) -> dict[str, Tensor]:
    if base.family == "vision":
        return {"pixel_values": base.require_processor("watch").stack([text]).to(base.device)}
    ids = torch.tensor([tokens(base, text)], device=base.device)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.family == "seq2seq":
        found["decoder_input_ids"] = torch.tensor([[base.before(ids[0].tolist())]], device=base.device)
    return found


@contextmanager
def watching(model: nn.Module, modules: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, what ``modules`` of ``model`` read in the last forward, by name. Raises `AdapterError` when it has no such module."""
    seen: dict[str, Tensor] = {}
    known = dict(model.named_modules())
    known |= {f"{model.base_model_prefix}.{name}": module for name, module in known.items()}  # T5's parts as its classifier names them
    missing = sorted(set(modules) - set(known))
    if missing:
        raise AdapterError(f"router: {type(model).__name__} has no modules {missing[:3]}; the router cards are of another base")
    handles = [known[module].register_forward_pre_hook(partial(_see, seen, module)) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _see(seen: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    seen[name] = inputs[0]
