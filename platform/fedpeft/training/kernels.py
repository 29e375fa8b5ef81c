"""Liger's Triton kernels (optional package ``liger-kernel``) for norms, gates and rotations of the Llama kind, on CUDA, while training.

Each replaces a chain of elementwise operations that reads and writes the hidden states several times, and keeps less for the backward
pass. A class of module is replaced only if the kernel answers what the module answers on a small input, so names do not decide; a
module that trains is left alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

FAULTS = (RuntimeError, TypeError, ValueError, AttributeError)

Patch = Callable[[Any], Callable[..., Any]]
"""From a module to the forward that stands in for its own."""


@contextmanager
def fused_kernels(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Within, modules of ``model`` that a kernel can stand in for use it; without CUDA or the package nothing changes."""
    if not wanted or not usable(model):
        yield
        return
    with ExitStack() as stack:
        for patch, modules in _candidates(model).items():
            _swap(stack, patch, modules)
        for name in {type(module).__module__ for module in model.modules() if "attention" in type(module).__name__.lower()}:
            _swap_rotation(stack, sys.modules[name])
        yield


def usable(model: nn.Module) -> bool:
    """Whether the model lies on CUDA and the kernels are installed."""
    first = next(model.parameters(), None)
    if first is None or not first.is_cuda:
        return False
    try:
        import liger_kernel.ops  # noqa: F401
    except ImportError as fault:
        log.info("training without Liger kernels (%s); pip install liger-kernel for more speed", fault)
        return False
    return True


@contextmanager
def tensor_cores(wanted: bool) -> Iterator[None]:
    """Within, CUDA may multiply float32 in TF32."""
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _candidates(model: nn.Module) -> dict[Patch, list[nn.Module]]:
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")]
    gates = [module for module in model.modules() if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))]
    return {_norm: norms, _gate: [module for module in gates if "silu" in type(module.act_fn).__name__.lower()]}


def _norm(module: Any) -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda hidden: LigerRMSNormFunction.apply(hidden, module.weight, module.variance_epsilon, 0.0, "llama", False, None)


def _gate(module: Any) -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda hidden: module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(hidden), module.up_proj(hidden)))


def _swap(stack: ExitStack, patch: Patch, modules: list[nn.Module]) -> None:
    """Give modules their kernel, class by class, where it answers alike."""
    alike: dict[type[nn.Module], bool] = {}
    for module in modules:
        kind = type(module)
        if "forward" in module.__dict__ or any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            continue
        if kind not in alike:
            alike[kind] = _answers_alike(module, patch(module))
        if alike[kind]:
            object.__setattr__(module, "forward", patch(module))
            stack.callback(object.__delattr__, module, "forward")


def _swap_rotation(stack: ExitStack, source: Any) -> None:
    """Rotary embedding is a function of the model's file: it is replaced there, for CUDA tensors."""
    from liger_kernel.ops.rope import LigerRopeFunction

    own = getattr(source, "apply_rotary_pos_emb", None)
    if own is None or not _rotates_alike(own, LigerRopeFunction.apply):
        return

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or not q.is_cuda or cos.shape[-1] != q.shape[-1]:
            return own(q, k, cos, sin, *rest, **named)
        return LigerRopeFunction.apply(q, k, cos, sin)

    source.apply_rotary_pos_emb = rotate
    stack.callback(setattr, source, "apply_rotary_pos_emb", own)


@torch.no_grad()
def _answers_alike(module: Any, kernel: Callable[..., Any]) -> bool:
    width = len(module.weight) if hasattr(module, "weight") else module.gate_proj.in_features
    held = list(module.parameters())
    dtype = next((parameter.dtype for parameter in held if parameter.is_floating_point()), torch.bfloat16)  # all in 4 bit: any will do
    sample = torch.linspace(-2.0, 2.0, 3 * width, device=held[0].device).view(1, 3, width).to(dtype)
    try:
        return _close(kernel(sample), module.forward(sample))
    except FAULTS:
        return False


@torch.no_grad()
def _rotates_alike(own: Callable[..., Any], kernel: Callable[..., Any]) -> bool:
    q, k = (torch.linspace(-1.0, 1.0, heads * 3 * 64, device="cuda").view(1, 3, heads, 64).transpose(1, 2) for heads in (4, 2))
    angle = torch.linspace(0.0, 3.0, 3 * 32, device="cuda").view(1, 3, 32).repeat(1, 1, 2)
    try:
        wanted = own(q, k, angle.cos(), angle.sin())
        found = kernel(q.clone(), k.clone(), angle.cos(), angle.sin())
        return all(_close(a, b) for a, b in zip(found, wanted, strict=True))
    except FAULTS:
        return False


def _close(found: Tensor, wanted: Tensor) -> bool:
    scale = float(wanted.float().abs().max()) + 1e-6
    return found.shape == wanted.shape and float((found.float() - wanted.float()).abs().max()) <= 0.02 * scale
