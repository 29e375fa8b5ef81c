"""Virtual tokens per row: prompts of different lengths before the input's tokens, prefixes of different lengths before the keys.

Both happen where the trunk is called, so that a language model's logits line up with the caller's tokens. A row is ``[prefix | prompt,
tokens, padding]`` with a mask and positions of its own: prefixes are padded at their start, prompts at the row's end, so that every
token sits where it would sit alone, and an encoder's classifier pools the prompt's first token, as it does alone.

Shape legend: B rows, T tokens, D hidden width, F the longest prefix, P the longest prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedpeft.errors import AdapterError
from fedpeft.mixtures.dense import CHILD, Holder
from fedpeft.mixtures.plans import Pairs, Share
from fedpeft.mixtures.slabs import Slab
from fedpeft.mixtures.state import State

NAME = "prompt_embeddings"
KINDS = ("prompt", "prefix")


def kind_of(slab: Slab) -> str | None:
    """``prompt`` or ``prefix``, where the slab's adapters are virtual tokens."""
    kinds = {spec.method.kind for spec in slab.specs if spec is not None} & set(KINDS)
    return kinds.pop() if kinds else None


def check_soft(share: Share, by_row: bool) -> None:
    """Raise `AdapterError` when virtual tokens would have to be weighted, or belong to single tokens."""
    kind = kind_of(share.slab)
    if kind is not None and not (by_row and isinstance(share.plan, Pairs) and share.plan.weights is None):
        raise AdapterError(f"gates: a {kind} acts on whole rows, with weight 0 or 1; name its adapter in Gates.rows")


class SoftHost:
    """The forward of a trunk whose rows may have virtual tokens."""

    def __init__(self, trunk: Any, state: State, head: str) -> None:
        self.trunk, self.state, self.head = trunk, state, head
        self.base = trunk.forward
        self.signature = inspect.signature(type(trunk).forward)
        self.rest = next((name for name, p in self.signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")
        self.holder = Holder() if state.dense else None
        self._begun: tuple[list[int], int] | None = None
        object.__setattr__(trunk, "forward", self)
        if self.holder is not None:
            trunk.add_module(CHILD, self.holder)

    def release(self) -> None:
        """Give the trunk its own forward back."""
        object.__delattr__(self.trunk, "forward")
        if self.holder is not None:
            delattr(self.trunk, CHILD)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The trunk's output; for a language model (B, T, D) whatever the prompts' lengths."""
        bound = self.signature.bind(self.trunk, *args, **kwargs).arguments
        bound |= bound.pop(self.rest, {})
        del bound["self"]
        shares = [share for share in self.state.fixed if kind_of(share.slab)]
        if shares:
            rows, calls = self._embedded(bound), self._tokens(shares)
            done = _length(bound.get("past_key_values"))
            out = self._go_on(bound, rows, calls) if done else self._begin(bound, rows, calls)
        else:
            out = self.base(**bound)
        if self.holder is not None:
            busy = {id(share.slab) for share in shares}
            resting = [slab for slab in self.state.store.slabs if kind_of(slab) and id(slab) not in busy]
            for name in ("last_hidden_state", "pooler_output"):
                if getattr(out, name, None) is not None:
                    setattr(out, name, self.holder.idle(getattr(out, name), resting))
        return out

    def _tokens(self, shares: Sequence[Share]) -> dict[str, list[list[Tensor]]]:
        """By kind, the virtual tokens (L, width) of every row, one tensor per adapter that acts on it."""
        units = max(share.plan.units for share in shares)
        found: dict[str, list[list[Tensor]]] = {kind: [[] for _ in range(units)] for kind in KINDS}
        for share in shares:
            plan, kind = share.plan, kind_of(share.slab)
            assert isinstance(plan, Pairs)
            assert kind is not None
            tensor = share.slab.factor(NAME) if self.holder is None else self.holder(share.slab, NAME)
            values = tensor.index_select(0, plan.slots)
            if plan.units == 1:
                found[kind] = [[values[0], *own] for own in found[kind]]
                continue
            places = range(units)[plan.place] if isinstance(plan.place, slice) else plan.place.tolist()
            for row, own in zip(places, values, strict=True):
                found[kind][row].append(own)
        return found

    def _embedded(self, bound: dict[str, Any]) -> Tensor:
        """The input's embeddings (B, T, D)."""
        ids, rows = bound.pop("input_ids", None), bound.pop("inputs_embeds", None)
        if rows is None:
            rows = self.trunk.get_input_embeddings()(ids)
        positions = bound.get("position_ids")
        packed = positions is not None and bound.get("attention_mask") is None and int((positions == 0).sum()) > len(positions)
        if packed:
            raise AdapterError("mixture: rows with prompts or prefixes cannot be packed; give padded rows and their attention_mask")
        return rows  # type: ignore[no-any-return]

    def _begin(self, bound: dict[str, Any], rows: Tensor, calls: dict[str, list[list[Tensor]]]) -> Any:
        """The first call for a batch: virtual tokens come before its own."""
        prompts, prefixes, (batch, tokens) = _spread(calls["prompt"], rows), _spread(calls["prefix"], rows), rows.shape[:2]
        lengths, before = [sum(map(len, own)) for own in prompts], [sum(map(len, own)) for own in prefixes]
        mask = bound.pop("attention_mask", None)
        mask = torch.ones(batch, tokens, dtype=torch.long, device=rows.device) if mask is None else mask
        positions = bound.pop("position_ids", None)
        if positions is not None or any(before):
            positions = torch.arange(tokens, device=rows.device) if positions is None else positions
            positions = positions.expand(batch, tokens)
            bound["position_ids"] = _filled([_counted(p, n, f) for p, n, f in zip(positions, lengths, before, strict=True)], 0)
        if bound.get("token_type_ids") is not None:
            bound["token_type_ids"] = _filled([_led(ids, n, 0) for ids, n in zip(bound["token_type_ids"], lengths, strict=True)], 0)
        own = _filled([_led(part, n, 1) for part, n in zip(mask, lengths, strict=True)], 0)
        longest = max(before)
        lead = (torch.arange(longest, device=rows.device) >= longest - torch.tensor(before, device=rows.device)[:, None]).to(own.dtype)
        if longest:
            bound["past_key_values"] = self._cache(prefixes, longest, rows.dtype)
        embedded = _filled([torch.cat([*(p.to(rows.dtype) for p in prompt), row]) for prompt, row in zip(prompts, rows, strict=True)], 0)
        out = self.base(inputs_embeds=embedded, attention_mask=torch.cat([lead, own], 1), **bound)
        self._begun = ([longest, *before, *lengths], tokens)
        if self.head == "lm":
            places = torch.tensor(lengths, device=rows.device)[:, None] + torch.arange(tokens, device=rows.device)
            out.last_hidden_state = out.last_hidden_state.gather(1, places[..., None].expand(-1, -1, out.last_hidden_state.shape[2]))
        return out

    def _go_on(self, bound: dict[str, Any], rows: Tensor, calls: dict[str, list[list[Tensor]]]) -> Any:
        """A later call with the cache that the first one filled: mask and positions count what lies there."""
        mask = bound.pop("attention_mask", None)
        if self._begun is None or (mask is not None and mask.dim() != 2):
            raise AdapterError(
                "mixture: a cache came without the call that filled it, or a mask that is not (B, T); begin with the whole batch"
            )
        (longest, *both), tokens = self._begun
        batch = len(rows)
        before, lengths = (torch.tensor(part, device=rows.device)[:, None] for part in (both[:batch], both[batch:]))
        if mask is None:
            total = _length(bound["past_key_values"]) - longest - int(lengths.max()) + rows.shape[1]
            mask = torch.ones(batch, total, dtype=torch.long, device=rows.device)
        width = int(lengths.max()) + tokens
        place = torch.arange(width, device=rows.device).expand(batch, width)
        own = torch.where(
            place < lengths, 1, mask[:, :tokens].gather(1, (place - lengths).clamp(0, tokens - 1)) * (place < lengths + tokens)
        )
        lead = torch.arange(longest, device=rows.device) >= longest - before
        bound["position_ids"] = before + lengths + mask.shape[1] - rows.shape[1] + torch.arange(rows.shape[1], device=rows.device)
        bound["attention_mask"] = torch.cat([lead.to(mask.dtype), own.to(mask.dtype), mask[:, tokens:]], 1)
        bound.pop("cache_position", None)
        return self.base(inputs_embeds=rows, **bound)

    def _cache(self, prefixes: list[list[Tensor]], longest: int, dtype: torch.dtype) -> Any:
        """The prefixes as keys and values of every layer, (B, heads, F, width) each, padded at their start."""
        from transformers import DynamicCache

        if self.trunk.training and getattr(self.trunk, "is_activation_checkpointing", False):
            raise AdapterError("mixture: checkpointing drops the cache that holds prefixes; turn it off, or leave prefix adapters out")
        config = self.trunk.config
        layers, heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = next(part.shape[1] for own in prefixes for part in own)
        empty = torch.zeros(0, width, device=next(part.device for own in prefixes for part in own))
        whole = [torch.cat(own) if own else empty for own in prefixes]
        padded = torch.stack([nn.functional.pad(own, (0, 0, longest - len(own), 0)) for own in whole]).to(dtype)
        keys = padded.view(len(whole), longest, 2 * layers, heads, -1).permute(2, 0, 3, 1, 4)
        return DynamicCache(tuple((keys[2 * layer], keys[2 * layer + 1]) for layer in range(layers)))


def _spread(calls: list[list[Tensor]], rows: Tensor) -> list[list[Tensor]]:
    """One list per row; gates for one row hold for all."""
    if len(calls) != len(rows) and len(calls) != 1:
        raise AdapterError(
            f"mixture: the batch has {len(rows)} rows, the gates are for {len(calls)}; set gates that fit the batch with use"
        )
    return calls if len(calls) == len(rows) else calls * len(rows)


def _filled(rows: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)


def _led(row: Tensor, count: int, value: int) -> Tensor:
    return torch.cat([row.new_full((count,), value), row])


def _counted(positions: Tensor, prompt: int, prefix: int) -> Tensor:
    return torch.cat([torch.arange(prompt, device=positions.device), positions + prompt]) + prefix


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
