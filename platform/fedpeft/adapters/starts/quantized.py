"""LoftQ: a start that brings a quantized base back towards the dense one (Li et al. 2023, arXiv 2310.08659)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.starts import algebra
from fedpeft.adapters.starts.pairs import lora_of, placed
from fedpeft.bases.spec import QUANTIZED
from fedpeft.errors import AdapterError

if TYPE_CHECKING:
    from fedpeft.adapters.spec import Adapter, AdapterSpec
    from fedpeft.adapters.starts.protocol import Samples
    from fedpeft.bases import Base


@dataclass(frozen=True)
class LoftQ:
    """B A = the best approximation of W - Q(W) of rank r, Q being what the sites' bases went through.

    The paper goes on to quantize W - B A and repeats; here every site holds Q(W) already, so its first step is all of it. Compute it
    on a dense base; a site whose base is not quantized so would start off by the error that others are rid of. Q is exact for a site
    that loads float32; one that loads half precision and then quantizes (CUDA) differs by that rounding.
    """

    kind: ClassVar[str] = "loftq"
    needs_samples: ClassVar[bool] = False

    quantization: Literal["nf4", "int8"] = "nf4"

    def compute(self, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None = None) -> Adapter:
        """Round 0.

        Raises:
            AdapterError: the method is no plain LoRA with one pair that moves, or the base is quantized or without weights.
        """
        method = lora_of(self.kind, spec)
        if base.spec.quantization in QUANTIZED:
            raise AdapterError(
                f"start loftq: base {base.spec.model} is {base.spec.quantization} already; compute it on quantization 'none'"
            )
        if method.held:
            raise AdapterError("start loftq: a held pair would take its correction back; set method.held = false")
        return placed(base, spec, seed, self.kind, lambda _, w, rng: algebra.balanced(w - quantized(w, self.quantization), method.r, rng))


def quantized(weight: NDArray[np.float32], quantization: Literal["nf4", "int8"]) -> NDArray[np.float32]:
    """``weight`` (out, in) after a quantized base has stored and read it: bitsandbytes' nf4 with double quantization, or int8 by row."""
    import torch
    from bitsandbytes import functional

    dense = torch.from_numpy(weight.copy())
    if quantization == "int8":
        codes, largest, _ = functional.int8_vectorwise_quant(dense.half())  # its layers take weights in as float16
        return np.asarray((codes * (largest[:, None] / 127.0)).numpy(), np.float32)
    codes, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=True)
    return np.asarray(functional.dequantize_4bit(codes, state).float().numpy(), np.float32)
