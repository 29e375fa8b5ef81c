"""Token routers of `fedpeft.routing` on tensors: what `Gates.routed` asks at every module; x (N, n) -> scores (N, E)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from fedpeft.errors import AdapterError
from fedpeft.mixtures.gates import Gates
from fedpeft.routing import ArrowRouter, GateRouter, SpectrRouter, TokenRouter
from fedpeft.routing.prototypes import EPSILON
from fedpeft.routing.tokens import normed, stacked

Score = Callable[[Tensor], Tensor]
Known = GateRouter | ArrowRouter | SpectrRouter


def routed(router: TokenRouter, device: str = "cpu") -> Gates:
    """The mixture that ``router`` weighs, token by token and module by module, as `TokenRouter.weigher` does in numpy.

    Raises:
        AdapterError: the router is none of gate, Arrow and SpectR, or has no prototypes.
    """
    if not isinstance(router, Known) or not router.modules:
        raise AdapterError(f"router {router.kind}: weighs no tokens, or has no prototypes; use gate, arrow or spectr of trained adapters")
    scores = {module: _among(router, module, device) for module in router.modules}
    top = min(router.top, len(router.names))
    return Gates.routed(
        _Scores(scores, len(router.names)), router.names, top, normalise="uniform" if router.kind == "spectr" else "softmax"
    )


class _Scores:
    """Scores by module; where no adapter has a prototype, none is ever chosen."""

    def __init__(self, known: Mapping[str, Score], experts: int) -> None:
        self.known, self.experts = known, experts

    def __call__(self, module: str, x: Tensor) -> Tensor:
        score = self.known.get(module)
        return x.new_full((len(x), self.experts), -inf, dtype=torch.float32) if score is None else score(x.float())


def _among(router: Known, module: str, device: str) -> Score:
    """The scores of all adapters at ``module``: minus infinity for those without a prototype there."""
    here, found = stacked(router, module)
    score, places, experts = _scored(router, found, device), torch.tensor(np.flatnonzero(here), device=device), len(here)
    if all(here):
        return score
    return lambda x: x.new_full((len(x), experts), -inf).index_copy(1, places, score(x))


def _scored(router: Known, found: Sequence[NDArray[np.float32]], device: str) -> Score:
    if isinstance(router, SpectrRouter):
        return _spectra([normed(one) if router.unit else one for one in found], device)
    table = torch.from_numpy(np.stack(found)).to(device)
    if isinstance(router, ArrowRouter):
        directions = normalize(table, eps=EPSILON) / router.temperature
        return lambda x: (x @ directions.t()).abs()
    width = table.shape[1]
    gates = _standard(table) / (width**0.5 * router.temperature)
    return lambda x: _standard(x) @ gates.t()


def _spectra(found: Sequence[NDArray[np.float32]], device: str) -> Score:
    """``||S V' x||`` of all adapters from one product with their stacked spectra (R, n)."""
    ranks = torch.tensor([len(rows) for rows in found], device=device)
    owners = torch.repeat_interleave(torch.arange(len(found), device=device), ranks)
    stack = torch.from_numpy(np.concatenate(found)).to(device)
    return lambda x: x.new_zeros(len(x), len(found)).index_add(1, owners, (x @ stack.t()).square()).sqrt()


def _standard(rows: Tensor) -> Tensor:
    """Mean 0 and deviation 1 along each row."""
    return layer_norm(rows, rows.shape[-1:], eps=EPSILON**2)
