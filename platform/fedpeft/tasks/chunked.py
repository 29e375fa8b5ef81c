"""Cross-entropy without logits: a frozen output layer and the loss together, some tokens at a time.

The gradient with respect to the hidden states is made in the forward pass, while a chunk's logits are at hand, so that no logits are
kept: at 2048 tokens and a vocabulary of 128 000 they and their gradient are 3 GiB. Losses come out token by token, so any weighting of
tokens, by task or example, is one in the backward pass.

Shape suffixes: K labelled tokens, C of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

LOGITS = 1 << 25
"""Most logits held at once; 128 MiB in float32."""

LINE = re.compile(r"^\s*(?:\w+_)?logits (?:[-+*/]?=) (.*)$", re.MULTILINE)
HEAD = re.compile(r"self\.\w+\((?:hidden_states(?:\[:, slice_indices, :\])?|sequence_output)\)")

_whole: ContextVar[bool] = ContextVar("whole_logits", default=False)


@contextmanager
def whole_logits(wanted: bool = True) -> Iterator[None]:
    """Make all logits at once, as transformers does, and let autograd keep them."""
    token = _whole.set(wanted)
    try:
        yield
    finally:
        _whole.reset(token)


def head_of(model: Any) -> nn.Linear | None:
    """The output layer, where `losses_at` may stand in for it: frozen, plain, and the last thing that makes the logits."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if _whole.get() or type(head) is not nn.Linear or "forward" in head.__dict__:
        return None
    if head._forward_hooks and not hasattr(head.weight, "ds_id"):  # ZeRO-3's own, which fetch and release the weight
        return None
    if any(parameter.requires_grad for parameter in head.parameters()):
        return None
    kind: Any = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
    return head if _head_is_last(kind) else None


@contextmanager
def losses_at(head: nn.Linear, labels: Tensor, kept: Tensor | int = 0) -> Iterator[None]:
    """Within, ``head`` answers hidden states by the losses (1, K) of ``labels`` (K,), in nats.

    Hidden states are (1, K, H), or (S, U, H) of which those count that ``kept`` (S, U) says. It is called as ever, so hooks that fetch
    its weight (ZeRO-3's) run before it.
    """
    object.__setattr__(head, "forward", lambda hidden: token_cross_entropy(hidden[kept], head.weight, head.bias, labels)[None])
    try:
        yield
    finally:
        object.__delattr__(head, "forward")


def token_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Losses (K,) in float32 of ``labels`` (K,) under the logits ``hidden weight' + bias``: hidden (K, H), weight (V, H) frozen."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return cast(Tensor, _TokenCrossEntropy.apply(hidden, weight, bias, labels))  # type: ignore[no-untyped-call]


class _TokenCrossEntropy(torch.autograd.Function):
    """See `token_cross_entropy`; weight and bias are of the dtype to multiply in and get no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, LOGITS // len(weight))
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            logits = nn.functional.linear(hidden[part].to(weight.dtype), weight, bias).float()  # (C, V)
            wanted, scale = labels[part, None], logits.logsumexp(1, keepdim=True)
            losses[part] = (scale - logits.gather(1, wanted))[:, 0]
            if gradient is not None:
                logits.sub_(scale).exp_().scatter_add_(1, wanted, logits.new_full((), -1.0).expand(len(wanted), 1))
                gradient[part] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None, None, None


@cache
def _head_is_last(kind: Any) -> bool:
    """Whether the source of ``kind.forward`` assigns its logits once, straight from the output layer: no cap, scale or bias after it."""
    try:
        source = inspect.getsource(inspect.unwrap(kind.forward))
    except (OSError, TypeError):
        return False
    found = LINE.findall(source)
    return len(found) == 1 and HEAD.fullmatch(found[0].strip()) is not None
