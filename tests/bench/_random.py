"""Bases of a named shape with random weights: 4-bit layers are made on the device one by one, so a whole dense copy never exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedpeft.bases import BaseSpec, Fingerprint
from fedpeft.bases.base import Base
from fedpeft.bases.quantize import keep_layout

SHAPES: dict[str, dict[str, int]] = {
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000, "intermediate_size": 11008, "num_attention_heads": 32},
    "8B": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 256, "num_attention_heads": 4},
}


def random_base(shape: str, device: str, dtype: torch.dtype | None = None) -> Base:
    """A Llama of ``shape``: linear layers of the blocks in nf4 with double quantization, the rest in ``dtype`` (bf16; float32 on a CPU)."""
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, use_cache=False)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    torch.manual_seed(0)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), leaf, nf4_layer(module.in_features, module.out_features, device, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            fresh = torch.empty(parameter.shape, device=device, dtype=dtype)
            fresh = fresh.fill_(1.0) if "norm" in name else fresh.normal_(0.0, 0.02)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(fresh, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.is_loaded_in_4bit = True
    keep_layout(model)
    model.requires_grad_(False).eval()
    return Base(BaseSpec(f"random-{shape}", "nf4"), Fingerprint("w", "t", "", "nf4"), "causal", None, config, device, model, model.model)


def nf4_layer(width: int, height: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A 4-bit layer with random weights."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(width, height, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    dense = torch.empty(height, width, device=device, dtype=dtype).normal_(0.0, 0.02)
    codes, state = bnb.functional.quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(codes, False, state, 64, True, "nf4", module=layer, bnb_quantized=True)
    layer.quant_state = state
    return layer
