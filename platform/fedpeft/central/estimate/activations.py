"""Bytes that a training step keeps for its backward pass, from the shapes of a base's layers.

Counted is what our own functions keep (`methods.lowrank`, `tasks.chunked`, `training.packed`, Liger's kernels), per token: the input of
every group of layers that reads one, what attention and gates read, the input of each layer that ends a group, the input of each norm.
Attention over rows of sequences keeps no scores; keys and values count as often as there are query heads. Measured on an H100, this is
within 4 % of the peak of a 7B and an 8B shape, one row and four, checkpointed or not (`tests/unit/central/test_estimate.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedpeft.bases import module_roles
from fedpeft.central.estimate.weights import head_of
from fedpeft.tasks.chunked import LOGITS

if TYPE_CHECKING:
    from fedpeft.bases.base import Base
    from fedpeft.training.settings import TrainSettings

BLOCK = re.compile(r"(.*?\.\d+)\.")
WHOLE_LOGITS = 12
"""Bytes per logit where all are made at once: in half precision, in float32, and the gradient in float32 (with its copy in half)."""
CHUNK = 8
"""Bytes per logit of a chunk: float32, and twice in half precision."""
AHEAD = 2
"""Kept states that are on the device at a time when they rest in host memory."""


@dataclass(frozen=True)
class Block:
    """One repeated block, in bytes per token: what its backward pass needs, and what it holds while it runs."""

    kept: int
    passing: int


@dataclass(frozen=True)
class Shape:
    """What a step's memory depends on: blocks, bytes of a hidden state, the vocabulary (0: no language model), bytes of a value."""

    blocks: tuple[Block, ...]
    state: int
    hidden: int
    vocabulary: int
    width: int


@dataclass(frozen=True)
class Activations:
    """Bytes on the device in one micro-batch: ``kept`` through the step, ``working`` in the layer or loss at work; ``host`` at rest."""

    kept: int
    working: int
    host: int


def shape_of(base: Base, settings: TrainSettings, width: int, ranks: Mapping[str, int]) -> Shape:
    """The shape of ``base`` held in ``width`` bytes a value; ``ranks`` are the adapters' ranks at each layer, all tasks' together."""
    hidden = int(base.config.get_text_config().hidden_size)
    narrow = width if settings.precision == "fp32" else 2
    roles, norms = module_roles(base.model), _norms(base.model, hidden)
    groups: dict[str, dict[str, list[Any]]] = {}
    for role in ("attention", "mlp"):
        for name in roles[role]:
            found = BLOCK.match(name)
            groups.setdefault(found[1] if found else name, {}).setdefault(role, []).append((name, base.model.get_submodule(name)))
    blocks = tuple(_block(group, hidden, norms.get(name, ()), (narrow, width), ranks, settings) for name, group in groups.items())
    head = head_of(base)
    return Shape(blocks, hidden * width, hidden, 0 if head is None else int(head.weight.shape[0]), width)


def activations(shape: Shape, settings: TrainSettings, tokens: int, rows: int) -> Activations:
    """What a micro-batch of ``tokens`` in ``rows`` rows of a mask takes."""
    largest = max(shape.blocks, key=lambda block: block.kept + block.passing)
    layer = tokens * (largest.passing + (largest.kept if settings.checkpoint_activations else 0))
    mask = tokens * (tokens // max(rows, 1))
    states = len(shape.blocks) * tokens * shape.state
    if not settings.checkpoint_activations:
        return Activations(tokens * sum(block.kept for block in shape.blocks) + mask, max(layer, _loss(shape, settings, tokens)), 0)
    on_device = min(states, AHEAD * tokens * shape.state) if settings.offload_activations else states
    return Activations(on_device + mask, max(layer, _loss(shape, settings, tokens)), states if settings.offload_activations else 0)


def _loss(shape: Shape, settings: TrainSettings, tokens: int) -> int:
    """Every token counts as labelled: its last hidden state, that state's gradient, and logits."""
    logits = tokens * shape.vocabulary
    held = CHUNK * min(LOGITS, logits) if settings.chunked_loss else WHOLE_LOGITS * logits
    return held + 2 * tokens * shape.state


def _block(
    group: Mapping[str, Sequence[tuple[str, Any]]],
    hidden: int,
    norms: Iterable[tuple[int, bool]],
    widths: tuple[int, int],
    ranks: Mapping[str, int],
    settings: TrainSettings,
) -> Block:
    narrow, width = widths
    mlp = [layer for _, layer in group.get("mlp", ())]
    values = _attention([layer for _, layer in group.get("attention", ())], hidden) + _feeding(mlp, hidden)
    values += sum(ranks.get(name, 0) for names in group.values() for name, _ in names)
    normed = sum(size * (width if plain or settings.fused_kernels else width + 8) for size, plain in norms)
    passing = 2 * hidden + sum(_outputs(layer) for layer in mlp[:-1])
    return Block(narrow * values + normed, narrow * passing)


def _attention(layers: Sequence[Any], hidden: int) -> int:
    """Values per token: the input, query, key and value (fused or one by one), and the input of what ends the group."""
    if len(layers) % 4 == 0:
        groups = [layers[place : place + 4] for place in range(0, len(layers), 4)]
        return sum(hidden + 3 * max(map(_outputs, four[:3])) + _inputs(four[3]) for four in groups)
    return _feeding(layers, hidden)


def _feeding(layers: Sequence[Any], hidden: int) -> int:
    """Values per token: the input, what all but the last layer answer, and what the last one reads."""
    return hidden + sum(map(_outputs, layers[:-1])) + _inputs(layers[-1]) if layers else 0


def _norms(model: Any, hidden: int) -> dict[str, list[tuple[int, bool]]]:
    """Of each block, its norms over hidden states: (values per token, whether torch's own function computes it)."""
    found: dict[str, list[tuple[int, bool]]] = {}
    for name, module in model.named_modules():
        weight, block = getattr(module, "weight", None), BLOCK.match(name)
        if block and weight is not None and weight.shape == (hidden,):
            found.setdefault(block[1], []).append((hidden, "LayerNorm" in type(module).__name__ and hasattr(module, "normalized_shape")))
    return found


def _outputs(layer: Any) -> int:
    return int(getattr(layer, "out_features", None) or layer.nf)


def _inputs(layer: Any) -> int:
    return int(getattr(layer, "in_features", None) or layer.nx)
