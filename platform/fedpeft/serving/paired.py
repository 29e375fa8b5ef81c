"""Rows of an encoder-decoder in one running batch: each joins with a text that is read whole, and goes on token by token.

Two caches under the same slots: what the decoder said, and the keys and values that its cross-attention reads of what the encoder
said, computed once, under the row's own adapters. Shape suffixes: N rows, T tokens a row in this forward, W keys, H heads, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from fedpeft.serving.pasts import Told, additive, filled, last
from fedpeft.serving.slots import Slots
from fedpeft.tasks.encoding import opening

if TYPE_CHECKING:
    from fedpeft.bases import Base


class Paired:
    """What rows of an encoder-decoder look back on. A row's first tokens are the encoder's, all others the decoder's."""

    def __init__(self, base: Base) -> None:
        self._first = [int(opening(base, "")[-1])]
        self._decoder: Any = base.model.get_decoder()  # type: ignore[operator]
        self._width = int(base.config.get_text_config().hidden_size)
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self._said, self._read = Slots(), Slots()
        self._cache = EncoderDecoderCache(self._said, self._read)

    def take(self) -> int:
        """A new last slot."""
        self._said.take()
        return self._read.take()

    def give_back(self, slot: int) -> int:
        """Free a slot, as `Slots.give_back`."""
        self._said.give_back(slot)
        return self._read.give_back(slot)

    def apart(self, slots: Sequence[int]) -> list[list[int]]:
        """Those that have read their text, and those that have not: the encoder runs for the latter alone."""
        begun: list[list[int]] = [[], []]
        for place, slot in enumerate(slots):
            begun[self._read.lengths[slot] > 0].append(place)
        return [places for places in begun if places]

    def after(self, model: Any, rows: Told, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Logits (N, V) after the last token of each row; all rows have read their text, or none has."""
        slots = [slot for slot, _ in rows]
        begun = self._read.lengths[slots[0]] > 0
        heard = self._heard(slots, dtype, device) if begun else self._text(rows, device)
        told = [tokens if begun else self._first for _, tokens in rows]
        positions, seen = self._said.aim(slots, list(map(len, told)), device)
        with placed(self._decoder, positions, seen.shape[-1]):
            logits = model(
                decoder_input_ids=filled(told).to(device),
                decoder_attention_mask=additive(seen, dtype),
                past_key_values=self._cache,
                use_cache=True,
                **heard,
            ).logits  # (N, T, V)
        return last(logits, [len(tokens) - 1 for tokens in told])

    def plain(self, model: Any, told: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """Logits (V,) after the last token of one row that was told all this, by the model itself."""
        said = [*self._first, *(token for tokens in told[1:] for token in tokens)]
        inputs = {"input_ids": told[0], "decoder_input_ids": said}
        found: Tensor = model(**{name: torch.tensor([ids], device=device) for name, ids in inputs.items()}, use_cache=False).logits[0, -1]
        return found

    def _text(self, rows: Told, device: torch.device) -> dict[str, Any]:
        """Texts for the encoder, whose keys and values each layer then puts into the slots."""
        slots, texts = [slot for slot, _ in rows], [tokens for _, tokens in rows]
        self._read.aim(slots, list(map(len, texts)), device)
        self._cache.is_updated = {}
        return {"input_ids": filled(texts).to(device), "attention_mask": self._read.own(slots, device).long()}

    def _heard(self, slots: list[int], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """What was read before, in place of an encoder's output, whose values nothing looks at any more."""
        seen = self._read.look(slots, device)[:, None, None]  # (N, 1, 1, W)
        self._cache.is_updated = dict.fromkeys(range(len(self._read.layers)), True)
        silent = torch.empty(1, 1, self._width, dtype=dtype, device=device).expand(len(slots), seen.shape[-1], -1)
        return {"encoder_outputs": (silent,), "attention_mask": additive(seen, dtype)}


@contextmanager
def placed(decoder: Any, positions: Tensor, width: int) -> Iterator[None]:
    """Inside, row n of the decoder's tokens stands at ``positions[n]`` (N, T), where the model itself has all rows in step.

    Positions are embedded by a module ``embed_positions`` (BART and its kin), or weigh the attention to what is so many tokens back
    (T5 and its kin, Raffel et al. 2020, section 2.1), where ``width`` is how many keys there are.
    """
    with ExitStack() as stack:
        embeds = getattr(decoder, "embed_positions", None)
        if isinstance(embeds, nn.Module):
            stack.callback(embeds.register_forward_pre_hook(_every(width, positions.device), with_kwargs=True).remove)
            stack.callback(embeds.register_forward_hook(lambda _module, _inputs, table: table.flatten(0, -2)[positions]).remove)
        for module in decoder.modules():
            if getattr(module, "has_relative_attention_bias", False):
                stack.callback(module.__dict__.pop, "compute_bias")
                module.__dict__["compute_bias"] = _backwards(module.compute_bias, positions)
        yield


def _every(width: int, device: torch.device) -> Any:
    """A hook that asks for the embeddings (W, D) of all positions."""

    def asked(_module: nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return inputs, settings | {"position_ids": torch.arange(width, device=device)}

    return asked


def _backwards(own: Any, positions: Tensor) -> Any:
    """The bias (N, H, T, W) of every row from that of the last place (1, H, 1, W), which holds it for every distance."""

    def bias(_queries: int, keys: int, device: Any = None, past_seen_tokens: int = 0) -> Tensor:
        table: Tensor = own(1, keys, device=device, past_seen_tokens=keys - 1)[0, :, 0]
        back = (positions[:, :, None] - torch.arange(keys, device=positions.device)).clamp(min=0)
        return table[:, keys - 1 - back].transpose(0, 1)

    return bias
