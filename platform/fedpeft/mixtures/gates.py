"""Who acts on what: terms of a mixture as plain values; no torch at import.

A term gives every row, or every token, weights over named adapters. Terms add up, as their weight changes do:
``dW = s_t B_t A_t + sum over TopK of w_e(x) s_e B_e A_e + lambda_x s_c B_c A_c`` is ``rows + routed + weights`` (ALGORITHMS B2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fedpeft.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["rows", "weights", "tokens", "routed"]
Normalise = Literal["softmax", "none", "uniform"]


@dataclass(frozen=True, eq=False)
class Term:
    """One addend: ``names`` are the adapters that it may use, ``values`` what its kind takes.

    rows: ``picks`` (B,) an adapter or None per row. weights: ``values`` (B, E). tokens: ``values`` (B, S, E). routed: ``router``,
    asked at every module with its name and input, and the ``k`` largest of its E scores.
    """

    kind: Kind
    names: tuple[str, ...]
    picks: tuple[str | None, ...] = ()
    values: Any = None
    router: Any = None
    k: int = 0
    normalise: Normalise = "softmax"


@dataclass(frozen=True, eq=False)
class Gates:
    """A sum of terms, for `Bank.use`; the empty sum is the base (and the shared adapter) alone."""

    terms: tuple[Term, ...] = ()

    @staticmethod
    def rows(names: Sequence[str | None]) -> Gates:
        """One adapter per row of the batch; None: none."""
        picks = tuple(names)
        return Gates((Term("rows", tuple(dict.fromkeys(name for name in picks if name is not None)), picks=picks),))

    @staticmethod
    def weights(names: Sequence[str], w: Tensor) -> Gates:
        """Every row mixes the adapters ``names`` by ``w`` (B, E), which may require gradients. Raises `AdapterError` on another shape."""
        return Gates((Term("weights", _unique(names, w, 2, "(B, E)"), values=w),))

    @staticmethod
    def tokens(names: Sequence[str], w: Tensor) -> Gates:
        """Every token mixes the adapters ``names`` by ``w`` (B, S, E). Raises `AdapterError` on another shape."""
        return Gates((Term("tokens", _unique(names, w, 3, "(B, S, E)"), values=w),))

    @staticmethod
    def routed(router: Callable[[str, Tensor], Tensor] | Any, names: Sequence[str], k: int, *, normalise: Normalise = "softmax") -> Gates:
        """Every layer's own input decides: the scores (N, E) that ``router`` gives for the layer's input (N, in).

        ``router`` is a mapping from module names to callables of the input, or one callable of (module name, input). The ``k`` largest
        scores count: by their softmax (Arrow, PHATGOOSE, MixLoRA), as they are (``none``), or by 1/k each (``uniform``, SpectR).
        A score of minus infinity is never chosen.

        Raises:
            AdapterError: ``k`` is not between 1 and E.
        """
        chosen = _unique(names, None, 0, "")
        if not 1 <= k <= len(chosen):
            raise AdapterError(f"gates: k is {k}; choose from 1 to the number of adapters routed to, {len(chosen)}")
        return Gates((Term("routed", chosen, router=router, k=k, normalise=normalise),))

    def __add__(self, other: Gates) -> Gates:
        return Gates(self.terms + other.terms)

    @property
    def names(self) -> frozenset[str]:
        """All adapters named."""
        return frozenset(name for term in self.terms for name in term.names)


def _unique(names: Sequence[str], w: Any, dims: int, form: str) -> tuple[str, ...]:
    chosen = tuple(names)
    if not chosen or len(set(chosen)) < len(chosen):
        raise AdapterError(f"gates: adapters are {list(chosen)[:8]}; name one or more different ones")
    if w is not None and (w.dim() != dims or w.shape[-1] != len(chosen)):
        raise AdapterError(f"gates: weights have shape {list(w.shape)}; they must be {form} with E = {len(chosen)} adapters")
    return chosen
