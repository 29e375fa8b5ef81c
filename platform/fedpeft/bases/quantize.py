"""How each quantization is asked of transformers, and where it does not work.

What holds on CPU and was measured (fp32 compute; bf16 products are 30-60 times slower there): bitsandbytes nf4 with double
quantization, bitsandbytes int8, torchao int8 weight-only. Only the linear layers of the repeated blocks are
quantized; heads, poolers and embeddings keep their precision, and nothing is upcast.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from fedpeft.bases.roles import module_roles
from fedpeft.bases.spec import BaseSpec
from fedpeft.errors import BaseError

PACKAGES = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "ao-int8": "torchao"}
DEVICES = {
    "int8": ("cpu", "cuda"),
    "nf4": ("cpu", "cuda"),
    "ao-int8": ("cpu", "cuda"),
    "bf16": ("cpu", "cuda"),
    "fp16": ("cpu", "cuda"),
    "none": ("cpu", "cuda", "mps"),
}

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(spec: BaseSpec, device: str) -> torch.dtype:
    """What the unquantized part is held and computed in: fp32, but half precision for ``bf16``, ``fp16`` and quantized bases on CUDA."""
    if spec.quantization in HALVES:
        return HALVES[spec.quantization]
    if spec.quantization == "none" or not device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if multiplies_bf16(device) else torch.float16


def multiplies_bf16(device: str) -> bool:
    """Whether ``device``, of CUDA, has units for bf16, as of compute capability 8.0; older ones emulate it, and torch counts that too."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= 8


def settings(spec: BaseSpec, device: str, blueprint: nn.Module) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantize all but heads and what lies outside ``blueprint``'s blocks.

    Raises:
        BaseError: the library is not installed, or the quantization does not work on ``device``.
    """
    check(spec, device)
    if spec.quantization not in PACKAGES:
        return {}
    roles = module_roles(blueprint)
    return {"quantization_config": _config(spec, compute_dtype(spec, device), roles["head"] + roles["outside"])}


def check(spec: BaseSpec, device: str) -> None:
    """Raise `BaseError` when ``spec.quantization`` needs a library or a device that is not here."""
    kind = spec.quantization
    if device.split(":")[0] not in DEVICES[kind]:
        raise BaseError(f"base {spec.model}: quantization {kind!r} runs on {list(DEVICES[kind])}, not on {device}; use 'none'")
    package = PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise BaseError(f"base {spec.model}: quantization {kind!r} needs {package}; run pip install {package}, or use 'none'")


def check_quantized(spec: BaseSpec, model: nn.Module) -> None:
    """Raise `BaseError` when loading left every layer dense although ``spec`` asks for a quantization."""
    if spec.quantization in PACKAGES and not any(is_quantized(module) for module in model.modules()):
        raise BaseError(
            f"base {spec.model}: {spec.quantization!r} quantized no layer of {type(model).__name__}; use 'none', 'bf16' or 'fp16' for it"
        )


def keep_layout(model: nn.Module) -> None:
    """Make bitsandbytes' layers of ``model`` keep their weights as they were loaded, so that a site may evaluate and then train.

    On CPUs with AVX512-BF16 a 4-bit layer repacks itself at its first forward in eval mode, into bf16 and without a
    backward (gradients of earlier layers vanish with no error); that is forbidden. An 8-bit layer moves its scales from
    the weight to its state at the first forward; peft's DoRA then puts a weight back that has codes and no scales,
    whereupon the layer forgets them; a hook tells it to keep those it has.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "init_8bit_state"):
            module.register_forward_pre_hook(_keep_scales)


def _keep_scales(module: Any, inputs: Any) -> None:
    if module.weight.CB is not None and module.weight.SCB is None and module.state.SCB is not None:
        module.weight.CB = None


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer whose weight is not a plain floating-point tensor."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight is None:
        return False
    return not weight.is_floating_point() or type(weight.data) is not torch.Tensor


def _config(spec: BaseSpec, dtype: torch.dtype, skip: list[str]) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if spec.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        )
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=skip)
