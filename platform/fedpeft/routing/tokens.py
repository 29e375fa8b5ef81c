"""Routers that weigh every token at every module anew: PHATGOOSE's gates, Arrow, SpectR.

Each gives ``weigher(module)``, x (N, n) -> weights (N, E) in the order of ``names``, for a forward that mixes in rank space
(`prototypes.mix`); and `route`, the means of those weights over a request's tokens and modules, with scores that are cosines in [-1, 1],
so that thresholds can be calibrated and no adapter wins by being loud. A module where no adapter has a prototype weighs nothing.
Shape legend: N tokens, E adapters, n inputs of the module, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import AdapterError
from fedpeft.routing.prototypes import Values, arrow_scores, gate_scores, largest, spectrum_scores, top
from fedpeft.routing.requests import Request, Route
from fedpeft.routing.routers import Temperature, Top

Prototypes = Mapping[str, Mapping[str, Values]]
"""Adapter -> module -> prototype."""
Weigher = Callable[[Values], Values]


class TokenRouter(Protocol):
    """What a mixture needs of a router over tokens."""

    kind: ClassVar[str]

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order of all (N, E)."""
        ...

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules where some adapter has a prototype."""
        ...

    def measure(self, module: str, x: Values) -> Values:
        """Scores in [-1, 1] (N, E) that no scale of x or adapter changes; -inf for an adapter without a prototype there."""
        ...

    def weigher(self, module: str) -> Weigher:
        """The weights (N, E) of tokens x (N, n)."""
        ...


@dataclass(frozen=True, eq=False)
class GateRouter:
    """PHATGOOSE (Muqeeth et al. 2024, arXiv 2402.05859): gates (n,) trained beside frozen adapters; softmax over a token's ``top``."""

    prototypes: Prototypes
    top: Top = 2
    temperature: Temperature = 1.0
    kind: ClassVar[str] = "gate"

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, sorted."""
        return tuple(sorted(self.prototypes))

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules with a gate."""
        return modules_of(self.prototypes)

    def measure(self, module: str, x: Values) -> Values:
        """Cosines of standardised tokens and gates."""
        here, gates = stacked(self, module)
        return spread(here, gate_scores(np.stack(gates), x) / np.float32(np.sqrt(x.shape[1])))

    def weigher(self, module: str) -> Weigher:
        """Softmax over the ``top`` of LN(v) . LN(x) / sqrt(n)."""
        here, gates = stacked(self, module)
        table = np.stack(gates)
        return lambda x: chosen(spread(here, gate_scores(table, x)) / np.float32(self.temperature), self.top)

    def route(self, request: Request) -> Route:
        """See `over_tokens`."""
        return over_tokens(self, request)


@dataclass(frozen=True, eq=False)
class ArrowRouter:
    """Arrow (Ostapenko et al. 2024, arXiv 2405.11157): softmax over the ``top`` of |v . x|, v what the adapter stretches most.

    Prototypes are taken at unit length, whatever their own: the adapters' sizes have no say.
    """

    prototypes: Prototypes
    top: Top = 4
    temperature: Temperature = 1.0
    kind: ClassVar[str] = "arrow"

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, sorted."""
        return tuple(sorted(self.prototypes))

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules with a prototype."""
        return modules_of(self.prototypes)

    def measure(self, module: str, x: Values) -> Values:
        """|cosine| of tokens and prototypes."""
        here, table = self._table(module)
        return spread(here, arrow_scores(table, unit(x)))

    def weigher(self, module: str) -> Weigher:
        """Softmax over the ``top`` of |v . x|."""
        here, table = self._table(module)
        return lambda x: chosen(spread(here, arrow_scores(table, x)) / np.float32(self.temperature), self.top)

    def route(self, request: Request) -> Route:
        """See `over_tokens`."""
        return over_tokens(self, request)

    def _table(self, module: str) -> tuple[list[bool], Values]:
        here, vectors = stacked(self, module)
        return here, unit(np.stack(vectors))


@dataclass(frozen=True, eq=False)
class SpectrRouter:
    """SpectR (arXiv 2504.03454): equal weights on the ``top`` of ||S V' x||, what the adapter does to the token; spectra are (r, n).

    Spectra are divided by their largest singular value, so that the loudest adapter does not win every token; ``unit = False`` takes
    them as they are, as published.
    """

    prototypes: Prototypes
    top: Top = 4
    unit: bool = True
    kind: ClassVar[str] = "spectr"

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, sorted."""
        return tuple(sorted(self.prototypes))

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules with a spectrum."""
        return modules_of(self.prototypes)

    def measure(self, module: str, x: Values) -> Values:
        """||S V' x|| over the largest singular value and ||x||: in [0, 1]."""
        here, spectra = stacked(self, module)
        return spread(here, spectrum_scores([normed(spectrum) for spectrum in spectra], unit(x)))

    def weigher(self, module: str) -> Weigher:
        """1 / ``top`` on each of the ``top``."""
        here, spectra = stacked(self, module)
        taken = [normed(spectrum) if self.unit else spectrum for spectrum in spectra]
        each = np.float32(1.0 / min(self.top, len(here)))
        return lambda x: among(spread(here, spectrum_scores(taken, x)), self.top) * each

    def route(self, request: Request) -> Route:
        """See `over_tokens`."""
        return over_tokens(self, request)


def over_tokens(router: TokenRouter, request: Request) -> Route:
    """Mean weights and scores over all tokens of ``request`` and all modules that the router knows.

    Raises:
        AdapterError: the request has no hidden states, or none of a module that the router knows.
    """
    modules = [module for module in router.modules if module in request.states]
    if not modules:
        raise AdapterError(f"router {router.kind}: the request has states of {sorted(request.states)[:3]}, it knows {router.modules[:3]}")
    means = [router.weigher(module)(request.states[module]).mean(axis=0, dtype=np.float64) for module in modules]
    weights: list[float] = np.mean(means, axis=0).tolist()
    found = np.stack([router.measure(module, request.states[module]).mean(axis=0, dtype=np.float64) for module in modules])
    scores = np.where(np.isfinite(found), found, 0.0).sum(axis=0) / np.maximum(np.isfinite(found).sum(axis=0), 1)
    shares = {name: weight for name, weight in zip(router.names, weights, strict=True) if weight > 0.0}
    table = dict(zip(router.names, scores.tolist(), strict=True))
    why = f"mean weights of {len(modules)} modules over {len(request.states[modules[0]])} tokens"
    return Route(shares, max(table.values(), default=0.0), table, router.kind, why, "token")


def modules_of(prototypes: Prototypes) -> tuple[str, ...]:
    """Modules that any adapter has a prototype for."""
    return tuple(dict.fromkeys(module for own in prototypes.values() for module in own))


def stacked(router: GateRouter | ArrowRouter | SpectrRouter, module: str) -> tuple[list[bool], list[Values]]:
    """Which adapters have a prototype for ``module``, and these. Raises `AdapterError` when none has, or inputs differ in size."""
    found = {name: router.prototypes[name][module] for name in router.names if module in router.prototypes[name]}
    sizes = {name: values.shape[-1] for name, values in found.items()}
    if len(set(sizes.values())) != 1:
        raise AdapterError(f"router {router.kind}: inputs of {module!r} have sizes {sizes}; they are of different bases, or of none")
    return [name in found for name in router.names], list(found.values())


def spread(here: Sequence[bool], scores: Values) -> Values:
    """Scores of the adapters that are ``here`` (N, e), among all (N, E): -inf for the others."""
    if all(here):
        return scores
    wide = np.full((len(scores), len(here)), -np.inf, np.float32)
    wide[:, np.flatnonzero(here)] = scores
    return wide


def chosen(scores: Values, k: int) -> Values:
    """`prototypes.top` of at most all adapters; those at -inf weigh nothing."""
    return top(scores, min(k, scores.shape[1]))


def among(scores: Values, k: int) -> NDArray[np.bool_]:
    """Which scores are finite and among the ``k`` largest of their row (N, E); a softmax would lose the small ones to underflow."""
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, largest(scores, min(k, scores.shape[1])), True, axis=1)
    picked: NDArray[np.bool_] = found & np.isfinite(scores)
    return picked


def unit(rows: Values) -> Values:
    """Rows at length 1; zeros stay zeros."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: Values = rows / np.maximum(lengths, np.float32(1e-12))
    return scaled


def normed(spectrum: Values) -> Values:
    """A spectrum (r, n) over its largest singular value, the length of its first row."""
    scaled: Values = spectrum / np.maximum(np.linalg.norm(spectrum[0]), np.float32(1e-30))
    return scaled
