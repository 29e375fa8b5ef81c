"""Gradient inversion: which tokens of a site's rows can be read out of one update of its low-rank factors?

The gradient of a linear layer is a sum over tokens of outer products with the layer's inputs, so its rows lie in the span of those
inputs; and the first layer's inputs are known for every token of the public base's vocabulary at every position. While there are
fewer tokens than dimensions, a token is read by testing whether its input lies in the span (Petrov et al. 2024, arXiv 2405.15586).
The gradient of A spans inputs x, that of B spans A x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.audits.subject import Subject
from fedpeft.errors import AdapterError
from fedpeft.factors import Pair, pairs
from fedpeft.privacy.secagg import apply_masks
from fedpeft.tensors import Tensors
from fedpeft.training.modes import evaluating
from fedpeft.update import Grid, Update

if TYPE_CHECKING:
    from fedpeft.adapters.live import Live
    from fedpeft.tasks import Row

Matrix = NDArray[np.float64]
CHUNK = 4096


@dataclass(frozen=True)
class View:
    """What of a site's update the attacker sees: clipped to norm ``clip`` (0: not), with noise of ``noise * clip``, or masked."""

    name: str
    clip: float = 0.0
    noise: float = 0.0
    masked: bool = False

    def of(self, update: Update, draws: np.random.Generator) -> Sight:
        """The mean delta as the coordinator decodes it from this one site's message."""
        rounding = update.grid.step / update.weight / 12**0.5
        if self.masked:
            codes = update.codes.copy()
            apply_masks(codes, [draws.bytes(16)])
            return Sight(replace(update, codes=codes).mean(), rounding)
        whole = update.mean()
        factor = min(1.0, self.clip / max(whole.norm(), 1e-30)) if self.clip else 1.0
        noise = draws.normal(0.0, self.noise * self.clip, whole.flat.size) if self.noise else 0.0
        values = (whole.flat * factor + noise).astype(np.float32)
        return Sight(Tensors(whole.layout, values), float(np.hypot(rounding * factor, self.noise * self.clip)))


@dataclass(frozen=True, eq=False)
class Sight:
    """A delta that the attacker sees, and the standard deviation of the noise and rounding in each value, which are public."""

    delta: Tensors
    deviation: float


VIEWS = (
    View("plain"),
    View("clipped", clip=1e-2),
    View("noise 0.001", clip=1e-2, noise=1e-3),
    View("noise 0.1", clip=1e-2, noise=0.1),
    View("noise 1", clip=1e-2, noise=1.0),
    View("masked", masked=True),
)
"""Clipping alone rescales the span and hides nothing; noise is in units of the clipping norm."""


@dataclass(frozen=True)
class Inversion:
    """Share of distinct tokens read from an update, over ``rows``; ``chance`` is what naming tokens at random would give."""

    view: str
    recovered: float
    chance: float
    rows: int
    tokens: int


def invert(subject: Subject, rows: Sequence[Row], views: Sequence[View] = VIEWS, per_update: int = 1) -> list[Inversion]:
    """Train on ``per_update`` rows at a time, encode the update as a site would, and read tokens back from each view of it.

    Raises:
        AdapterError: the method has no low-rank factors in the first layer, or the base is an encoder-decoder, which has two of them,
            or reads images.
        UpdateError: training diverged, or the delta leaves the round's grid.
    """
    if subject.base.family == "vision":
        raise AdapterError(
            f"inversion: {type(subject.base.model).__name__} reads images, and this attack reads tokens back; run the other audits"
        )
    if subject.base.family == "seq2seq":
        raise AdapterError(
            f"inversion: {type(subject.base.model).__name__} reads prompts and completions in two first layers, and this attack knows one; "
            "run the other audits, and judge by a causal base of that size"
        )
    start = _moved(subject)
    groups = [rows[place : place + per_update] for place in range(0, len(rows), per_update)]
    draws = np.random.default_rng(subject.seed)
    seen = [[view.of(update, draws) for view in views] for update in (_update(subject, start, group) for group in groups)]
    truth = [_tokens(subject, group) for group in groups]
    longest = max(len(ids) for group in groups for ids in subject.task.encode(group, subject.base).ids)
    distances = _distances(subject, start, [one for group in seen for one in group], longest)
    out = []
    for place, view in enumerate(views):
        hits = [_hits(distances[number * len(views) + place], found) for number, found in enumerate(truth)]
        wanted = sum(map(len, truth))
        chance = sum(len(found) ** 2 for found in truth) / max(wanted, 1) / distances.shape[1]
        out.append(Inversion(view.name, sum(hits) / max(wanted, 1), chance, len(rows), wanted))
    return out


def _moved(subject: Subject) -> Tensors:
    """The round-0 adapter, its ``B`` off zero where it starts there: the attacker knows it, and a round-0 gradient of A is nothing."""
    start = subject.start
    draws, flat = np.random.default_rng((subject.seed, 2)), start.flat.copy()
    span = start.layout.role_spans.get("B", slice(0, 0))
    if not flat[span].any():
        flat[span] = draws.normal(0.0, 0.02, span.stop - span.start)
    return Tensors(start.layout, flat)


def _update(subject: Subject, start: Tensors, rows: Sequence[Row]) -> Update:
    """What a site would send after its local training: fixed point, weight 1, a cohort of three."""
    with subject.trained(start, rows) as (live, _):
        delta = live.read() - start
    return Update.encode(delta.pick(subject.roles or subject.spec.layout.roles), 1.0, {}, Grid(3))


def _tokens(subject: Subject, rows: Sequence[Row]) -> frozenset[int]:
    """The distinct tokens of ``rows``, without those that stand in every row."""
    special = set(subject.base.tokenizer.all_special_ids)
    return frozenset(int(token) for ids in subject.task.encode(rows, subject.base).ids for token in ids) - special


def _hits(distance: Matrix, truth: frozenset[int]) -> int:
    """How many of ``truth`` are among the equally many nearest tokens."""
    return len(truth & set(np.argsort(distance, kind="stable")[: len(truth)].tolist()))


def _distances(subject: Subject, start: Tensors, sights: Sequence[Sight], positions: int) -> Matrix:
    """For every sight and token (U, V): the smallest relative distance of the token's input to the update's span, at any position."""
    with _attached(subject, start) as live:
        family = _family(live, subject)
        spans = [_spans(sight, start, family) for sight in sights]
        size = len(subject.base.tokenizer)
        best = np.full((len(sights), size), np.inf)
        for first in range(0, size, CHUNK):
            ids = np.arange(first, min(first + CHUNK, size))
            for position in range(positions):
                inputs = _inputs(live, family, ids, position)
                for number, span in enumerate(spans):
                    np.minimum(best[number, ids], _apart(inputs, span), out=best[number, first : first + len(ids)])
        best[:, list(subject.base.tokenizer.all_special_ids)] = np.inf
        return best


def _attached(subject: Subject, start: Tensors) -> Live:
    from fedpeft.adapters import attach

    live = attach(subject.base, subject.spec)
    live.load(start)
    return live


@dataclass(frozen=True, eq=False)
class _Span:
    """Features of an input x are ``reader`` x (or x itself); those of the batch's tokens lie in ``basis`` (k, d)."""

    reader: Matrix | None
    basis: Matrix


def _spans(sight: Sight, start: Tensors, family: Mapping[Pair, Any]) -> list[_Span]:
    """What the deltas of the first layer's factors span. A's say more than B's, as they are not projected; of B's the widest count.

    A gradient so small that rounding hides part of it would exclude tokens that are there.
    """
    named, own = sight.delta.named(), start.named()
    downs = [named[pair.a].astype(np.float64) for pair in family if pair.a in named]
    if downs and any(down.any() for down in downs):
        return [_Span(None, _rows(np.vstack(downs), sight.deviation))]
    ups = [pair for pair in family if pair.b in named]
    spans = [_Span(own[pair.a].astype(np.float64), _rows(named[pair.b].astype(np.float64), sight.deviation)) for pair in ups]
    widest = max((len(span.basis) for span in spans), default=0)
    return [span for span in spans if len(span.basis) == widest]


def _rows(matrix: Matrix, deviation: float) -> Matrix:
    """An orthonormal basis (k, d) of the rows of ``matrix`` (m, d) that stand out of its noise, at least one and never all of space.

    Noise alone has singular values up to about ``deviation`` (sqrt(m) + sqrt(d)).
    """
    _, sizes, basis = np.linalg.svd(matrix, full_matrices=False)
    rows, columns = matrix.shape
    count = int((sizes > 1.1 * deviation * (rows**0.5 + columns**0.5)).sum())
    return np.asarray(basis[: max(min(count, columns - 1), 1)])


def _apart(inputs: Matrix, spans: Sequence[_Span]) -> Matrix:
    """Squared distance to the spans over squared length, summed over spans: (N, I) -> (N,)."""
    total = np.zeros(len(inputs))
    for span in spans:
        features = inputs if span.reader is None else inputs @ span.reader.T
        length = np.maximum((features**2).sum(1), 1e-30)
        inside = ((features @ span.basis.T) ** 2).sum(1)
        total += np.maximum(1.0 - inside / length, 0.0)
    return total


class _Seen(Exception):  # noqa: N818 - it carries an answer out of a forward pass
    """The first layer has read its input."""


def _family(live: Live, subject: Subject) -> dict[Pair, Any]:
    """The factor pairs that read the first layer's input, and their modules. Raises `AdapterError` when there are none."""
    layers = _layers(live, subject)
    seen: list[tuple[Pair, torch.Tensor]] = []
    with ExitStack() as hooks, torch.no_grad(), evaluating(live.model):
        for pair, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _layer, given, pair=pair: seen.append((pair, given[0])))
            hooks.callback(handle.remove)
        live.model(input_ids=torch.tensor([[0, 1]], device=live.flat.device))
    first = seen[0][1] if seen else None
    family = {pair: layers[pair] for pair, given in seen if given is first}
    if not family:
        raise AdapterError(f"inversion: method {type(subject.spec.method).__name__} has no factors A and B that a forward pass reads")
    return family


def _layers(live: Live, subject: Subject) -> dict[Pair, Any]:
    """The module that holds each pair: the lowest one with both factors inside."""
    names = {id(parameter): name for name, parameter in live.model.named_parameters()}
    found = {}
    for pair in pairs(subject.spec.layout) if {"A", "B"} <= subject.spec.layout.roles else ():
        first, second = (names[id(live.parameters[name])].split(".") for name in (pair.a, pair.b))
        found[pair] = live.model.get_submodule(".".join(first[: _agreeing(first, second)]))
    return found


def _agreeing(first: Sequence[str], second: Sequence[str]) -> int:
    return next(
        (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), min(len(first), len(second))
    )


def _inputs(live: Live, family: Mapping[Pair, Any], ids: NDArray[np.int64], position: int) -> Matrix:
    """What the first layer reads for each token alone at ``position``: (N,) -> (N, I)."""

    def stop(_layer: Any, given: tuple[torch.Tensor, ...]) -> None:
        raise _Seen(given[0])

    handle = next(iter(family.values())).register_forward_pre_hook(stop)
    tokens = torch.from_numpy(ids).to(live.flat.device)[:, None]
    try:
        with torch.no_grad(), evaluating(live.model):
            live.model(input_ids=tokens, position_ids=torch.full_like(tokens, position))
    except _Seen as found:
        return np.asarray(found.args[0][:, 0].double().cpu().numpy())
    finally:
        handle.remove()
    raise AdapterError("inversion: the first layer did not run; this base cannot be audited")
