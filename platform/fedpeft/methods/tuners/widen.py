"""Tuners over half-precision and quantized layers: they compute in float32, as what they train is, layers below in their own dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.bases.quantize import is_quantized

Named = tuple[tuple[Any, ...], dict[str, Any]]


def widen(tuned: nn.Module, reads: bool) -> None:
    """Where a layer that peft wrapped is of another dtype than float32: cast its tuner's inputs and outputs, and the tuner's buffers.

    ``reads``: the tuner multiplies a dense layer's weight itself, in the weight's dtype; there nothing is cast.
    """
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in tuned.modules() if isinstance(module, BaseTunerLayer)]
    narrow = [layer for layer in layers if _narrow(layer.get_base_layer(), reads)]
    for layer in narrow:
        _narrow_base(layer.get_base_layer())
        layer.register_forward_pre_hook(_to_float, with_kwargs=True)
        layer.register_forward_hook(_back, with_kwargs=True)
    if narrow:
        for table in (module for module in tuned.modules() if isinstance(module, BufferDict)):
            for name, value in table.items():
                table[name] = value.float() if value.is_floating_point() else value


def own_outputs(tuned: nn.Module) -> None:
    """Copy what quantized layers answer, for tuners that write into it: it is a view of what their backward needs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [module for module in tuned.modules() if isinstance(module, BaseTunerLayer)]:
        base = layer.get_base_layer()
        if is_quantized(base):
            base.register_forward_hook(lambda module, inputs, output: output.clone())


def _narrow(base: nn.Module, reads: bool) -> bool:
    return is_quantized(base) or (not reads and _dtype(base) != torch.float32)


def _dtype(base: nn.Module) -> torch.dtype:
    """What ``base`` computes in; float32 where only its inputs decide."""
    return next((parameter.dtype for parameter in base.parameters() if parameter.is_floating_point()), torch.float32)


def _narrow_base(base: nn.Module) -> None:
    if is_quantized(base):
        return  # it casts its inputs itself
    dtype = _dtype(base)

    def cast(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_cast(value, dtype) for value in inputs)

    base.register_forward_pre_hook(cast)
    base.register_forward_hook(lambda module, inputs, output: _cast(output, torch.float32))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _to_float(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Named:
    layer.asked = next((value.dtype for value in inputs if isinstance(value, Tensor) and value.is_floating_point()), None)  # type: ignore[assignment]
    return tuple(_cast(value, torch.float32) for value in inputs), named


def _back(layer: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    return output if layer.asked is None else _cast(output, layer.asked)
