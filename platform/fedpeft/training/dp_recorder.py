"""The gradient of every example by itself, from one backward: each use of a trained tensor leaves what its gradient is made of.

While a `Recorder` is on, torch's functions that read a trained tensor are answered by `dp_rules`: the same value, but the tensor's
gradient is taken per example from the function's input and the gradient of its output (Goodfellow 2015, arXiv 1510.01799), and never
reaches the tensor. A use that no rule knows would let it through; the recorder stops there, so what it gives is exact or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fedpeft.errors import PrivacyError
from fedpeft.training.dp_rows import PerExample, Rows, Whole

Note = Callable[..., None]
"""Takes the gradient of a function's output, then what was saved of its inputs."""


class Recorder(TorchFunctionMode):
    """Records forwards and backwards inside its ``with`` block for the examples that `expect` named."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], method: str) -> None:
        super().__init__()
        self.parameters, self.method = dict(parameters), method
        self.rows, self.scale = Rows(0), 1.0
        self.found: dict[str, PerExample] = {}
        self._anchor = next(iter(parameters.values())).new_zeros(()).requires_grad_()
        self._names: dict[int, tuple[str, float, Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def expect(self, rows: Rows) -> Recorder:
        """Start over, for a forward of these examples; whoever multiplies their loss says by what in ``scale``."""
        self.rows, self.scale, self.found = rows, 1.0, {}
        return self

    def __enter__(self) -> Recorder:
        self._names = {id(parameter): (name, 1.0, parameter) for name, parameter in self.parameters.items()}
        self._handles = [self._guard(name, parameter) for name, parameter in self.parameters.items()]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles, self._names = [], {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the function's rule answer, if it has one that knows what to do here."""
        from fedpeft.training.dp_rules import RULES

        kwargs = kwargs or {}
        known = torch.is_grad_enabled() and "input" not in kwargs  # the rules take inputs by position
        rule = RULES.get(func) if known else None
        answer = NotImplemented if rule is None else rule(self, func, *args, **kwargs)
        return func(*args, **kwargs) if answer is NotImplemented else answer

    def watches(self, value: Any) -> bool:
        """Whether ``value`` is a trained tensor, or one of its values in another form."""
        return id(value) in self._names

    def alias(self, value: Any, other: Any, factor: float = 1.0) -> None:
        """``value`` holds what ``other`` holds times ``factor``, in the same order, up to a constant."""
        if value is not other:
            name, before, _ = self._names[id(other)]
            self._names[id(value)] = (name, before * factor, value)

    def add(self, value: Any, gradients: PerExample) -> None:
        """Count ``gradients`` as those of the trained tensor behind ``value``; several uses add up."""
        name, factor, _ = self._names[id(value)]
        gradients = gradients if factor == 1.0 else Whole(gradients.dense() * factor)
        if name in self.found:
            gradients = Whole(self.found[name].dense() + gradients.dense())
        self.found[name] = gradients

    def tap(self, output: Tensor, note: Note, *saved: Tensor) -> Tensor:
        """``output``, whose gradient will be shown to ``note`` together with ``saved``."""
        found: Tensor = _Tap.apply(output, self._anchor, note, *saved)  # type: ignore[no-untyped-call]
        return found

    def squares(self) -> Tensor:
        """Squared norms (N,) of the examples' gradients over all trained tensors."""
        squares = [gradients.squares() for gradients in self.found.values()]
        return torch.stack(squares).sum(0) / self.scale**2 if squares else self._anchor.new_zeros(self.rows.count)

    def _guard(self, name: str, parameter: nn.Parameter) -> RemovableHandle:
        def refuse(gradient: Tensor | None) -> None:
            if gradient is not None:
                raise PrivacyError(
                    f"example-level privacy: method {self.method} uses {name} in a way whose gradient per example is not known; "
                    "use lora, ia3, bottleneck, bitfit, prompt or prefix, or client-level privacy"
                )

        handle: RemovableHandle = parameter.register_hook(refuse)  # type: ignore[no-untyped-call]
        return handle


class _Tap(torch.autograd.Function):
    """The identity; its output wants a gradient even where its input does not."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, note: Note, *saved: Tensor) -> Tensor:
        ctx.note = note
        ctx.save_for_backward(*saved)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            ctx.note(gradient, *ctx.saved_tensors)
        return (gradient if ctx.needs_input_grad[0] else None, *[None] * (2 + len(ctx.saved_tensors)))
