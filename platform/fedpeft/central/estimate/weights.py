"""Bytes of a base's frozen weights, from its outline: whole, in ZeRO-3's parts, and what one layer at work needs of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedpeft.bases import module_roles
from fedpeft.bases.spec import QUANTIZED, Quantization

if TYPE_CHECKING:
    from fedpeft.bases.base import Base

NF4_BLOCK, NF4_NESTED = 64, 256
"""Weights to a scale, and scales to a scale of scales (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
NF4_TABLES = (16 + 256 + 1) * 4
"""Both code books and the scales' mean, of each layer."""


@dataclass(frozen=True)
class Weights:
    """A base in bytes. ``small`` is what lies in tensors below a number of values, by which stage 3 leaves them whole.

    ``sizes`` are the (values, bytes) of each tensor that stage 3 can divide, ``fixed`` bytes that it cannot: scales and buffers.
    ``dense`` is the largest quantized weight once it is made dense, as happens where it is multiplied.
    """

    sizes: tuple[tuple[int, int], ...]
    fixed: int
    dense: int

    @property
    def whole(self) -> int:
        """All of it on one device."""
        return self.fixed + sum(size for _, size in self.sizes)

    def part(self, ranks: int, threshold: int) -> int:
        """One rank's share in stage 3; tensors of at most ``threshold`` values are whole on every rank besides."""
        divided = sum(
            -(-values // ranks) * (size // max(values, 1)) if size >= values else -(-size // ranks) for values, size in self.sizes
        )
        return self.fixed + divided + sum(size for values, size in self.sizes if values <= threshold)

    def live(self, values: int) -> int:
        """The most that stage 3 gathers at once when it may hold ``values``: that many, and no less than the largest tensor."""
        gathered = sorted(((count, size) for count, size in self.sizes), reverse=True)
        total = sum(count for count, _ in gathered)
        share = min(1.0, values / max(total, 1))
        return max(gathered[0][1], math.ceil(share * sum(size for _, size in gathered)))


def weights_of(base: Base, width: int) -> Weights:
    """The weights of ``base``, of which unquantized ones take ``width`` bytes a value."""
    quantized = set(quantized_names(base))
    sizes: list[tuple[int, int]] = []
    fixed = sum(buffer.numel() * buffer.element_size() for buffer in base.model.buffers())
    for name, parameter in base.model.named_parameters():
        kind: Quantization = base.spec.quantization if name in quantized else "none"
        codes, scales = quantized_bytes(kind, tuple(parameter.shape), width)
        sizes.append((parameter.numel(), codes))
        fixed += scales
    dense = max((parameter.numel() * width for name, parameter in base.model.named_parameters() if name in quantized), default=0)
    return Weights(tuple(sizes), fixed, dense)


def quantized_names(base: Base) -> list[str]:
    """The weights that ``base.spec.quantization`` holds as codes: those of linear layers in repeated blocks."""
    if base.spec.quantization not in QUANTIZED:
        return []
    roles = module_roles(base.model)
    return [f"{name}.weight" for role in ("attention", "mlp") for name in roles[role]]


def quantized_bytes(kind: Quantization, shape: tuple[int, ...], width: int) -> tuple[int, int]:
    """(codes, scales) of one tensor; scales are of blocks in nf4, of output rows in int8."""
    values = math.prod(shape)
    if kind == "nf4":
        blocks = -(-values // NF4_BLOCK)
        return -(-values // 2), blocks + 4 * -(-blocks // NF4_NESTED) + NF4_TABLES
    if kind in ("int8", "ao-int8"):
        return values, shape[0] * (4 if kind == "int8" else width)
    return values * width, 0


def head_of(base: Base) -> Any:
    """The output layer over words, or None."""
    return base.model.get_output_embeddings() if base.family != "encoder" else None  # type: ignore[operator]
