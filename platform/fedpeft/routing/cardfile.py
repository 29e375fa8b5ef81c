"""The router card of a version: all that routing needs to know of an adapter, derived from its aggregate and from sums, in one file.

``router.safetensors`` holds the tensors below, and ``card.json`` (UTF-8 in uint8) with the format, the sequence-level `Card` and the
scale statistics. It lies beside the version's adapter, so the manifest names its SHA-256 and signs it.

::

    gate/<module>      (n,)    float32   PHATGOOSE's gate, where sites trained one
    arrow/<module>     (n,)    float32   first right singular vector of B A, at unit length
    spectrum/<module>  (r, n)  float16   S V' of B A over its largest singular value
    moments/mean       (D,)    float32   mean embedding of the task's texts, where sites sent second moments
    moments/triangle   (P,)    float32   upper triangle of their covariance (`fedpeft.routing.moments`)
    moments/center     (D,)    float32   and the same of all tasks
    moments/within     (P,)    float32
    moments/ngrams     (B,)    float32   counts of the task's character n-grams, where sites sent them (`fedpeft.routing.ngrams`)
    moments/all        (B,)    float32   and of all tasks
    learned/router     (m, n)  float32   X-LoRA's router, where the adapter has one (`fedpeft.routing.learned`)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as write

from fedpeft.bases.spec import LAST
from fedpeft.errors import AdapterError
from fedpeft.factors import Product, norm, products
from fedpeft.routing.cards import BINS, Card
from fedpeft.routing.learned import Learned, checked
from fedpeft.routing.moments import BUCKETS, Measure, Moments, packed, unpacked
from fedpeft.routing.prototypes import Values, spectrum
from fedpeft.tensors import Layout, Tensors

FILE, FORMAT, HEAD = "router.safetensors", 1, "card.json"
PREFIX, FACTOR = "base_model.model.", ".lora_A.weight"
KINDS: dict[str, tuple[int, Any]] = {
    "gate": (1, np.float32),
    "arrow": (1, np.float32),
    "spectrum": (2, np.float16),
    "moments": (1, np.float32),
    "learned": (2, np.float32),
}
"""What tensors there may be: their axes and their dtype."""
Modules = Mapping[str, Values]


@dataclass(frozen=True)
class Scale:
    """How loud an adapter is at one module: the largest singular value of B A, and its Frobenius norm."""

    largest: float
    frobenius: float


@dataclass(frozen=True, eq=False)
class RouterCard:
    """See the module. ``spectra`` are float32 again, at their own size; ``counts`` are 64-bin histograms of own texts' scores by router.

    ``moments`` are of embeddings by ``card.encoder``, to float32's precision once read from a file. `closeness.TEXTED` among the counts
    is of closeness by embedding and spelling.
    """

    card: Card | None = None
    gates: Modules = field(default_factory=dict)
    arrows: Modules = field(default_factory=dict)
    spectra: Modules = field(default_factory=dict)
    scales: Mapping[str, Scale] = field(default_factory=dict)
    counts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    moments: Measure | None = None
    learned: Learned | None = None

    @property
    def watched(self) -> tuple[str, ...]:
        """What routers over tokens look at: modules of the base, and `LAST` for a trained router."""
        return tuple(sorted({*self.arrows, *self.gates, *((LAST,) if self.learned else ())}))

    def to_bytes(self) -> bytes:
        """The file; equal cards give equal bytes."""
        halves = {module: rows / np.float32(self.scales[module].largest) for module, rows in self.spectra.items()}
        named = {"gate": self.gates, "arrow": self.arrows, "spectrum": halves, "moments": _of_moments(self.moments)}
        named["learned"] = {} if self.learned is None else {"router": self.learned.table}
        tensors = {f"{kind}/{module}": np.ascontiguousarray(v, KINDS[kind][1]) for kind, own in named.items() for module, v in own.items()}
        head = {
            "format": FORMAT,
            "card": None if self.card is None else self.card.to_json(),
            "scales": {module: [scale.largest, scale.frobenius] for module, scale in self.scales.items()},
            "counts": {router: list(values) for router, values in self.counts.items()},
            **({} if self.moments is None else {"texts": [self.moments.own.count, self.moments.pool.count]}),
            **({} if self.learned is None else {"experts": list(self.learned.experts)}),
        }
        text = json.dumps(head, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        data: bytes = write({**tensors, HEAD: np.frombuffer(text, np.uint8)})
        return data

    @staticmethod
    def from_bytes(data: bytes) -> RouterCard:
        """Inverse of `to_bytes`, spectra to float16's precision. Raises `AdapterError` for anything else than such a file."""
        try:
            tensors: dict[str, NDArray[Any]] = parse(data)
            head = json.loads(tensors.pop(HEAD).tobytes())
        except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as fault:
            raise AdapterError(f"{FILE}: torn, or no router card ({type(fault).__name__}); publish or pull the version again") from None
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise AdapterError(f"{FILE}: not of format {FORMAT}; it was written by another version of fedpeft")
        groups = _groups(tensors)
        scales = _scales(head.get("scales"))
        return RouterCard(
            None if head.get("card") is None else _card(head["card"]),
            groups["gate"],
            groups["arrow"],
            {module: rows * np.float32(_scale(scales, module).largest) for module, rows in groups["spectrum"].items()},
            scales,
            _counts(head.get("counts")),
            _moments(groups["moments"], head.get("texts")),
            _learned(groups["learned"], head.get("experts")),
        )


def derive(tensors: Tensors, card: Card | None = None, gates: Modules | None = None, counts: Mapping[str, Any] | None = None) -> RouterCard:
    """The card of an adapter from its aggregated tensors; one that is no product of two LoRA factors has no prototypes.

    A module whose product is zero stretches no direction and has none either. ``gates`` are by module, ``counts`` as in `RouterCard`.
    """
    arrows, spectra, scales = dict[str, Values](), dict[str, Values](), dict[str, Scale]()
    for module, product in lora_products(tensors).items():
        rows = spectrum(product)
        largest = float(np.linalg.norm(rows[0].astype(np.float64)))
        scales[module] = Scale(largest, norm(product))
        if largest > 0.0:
            spectra[module] = rows
            sign = np.sign(rows[0][np.argmax(np.abs(rows[0]))])
            arrows[module] = rows[0] / np.float32(largest * sign)
    return RouterCard(card, dict(gates or {}), arrows, spectra, scales, {name: tuple(values) for name, values in (counts or {}).items()})


def lora_products(tensors: Tensors) -> dict[str, Product]:
    """The products ``B A`` of plain LoRA by module of the base; none for other methods."""
    named = [entry for entry in tensors.layout.entries if entry.role in ("A", "B")]
    if not named or not all(entry.name.endswith((FACTOR, ".lora_B.weight")) for entry in named):
        return {}
    return {module_of(pair.a): product for pair, product in products(tensors).items()}


def lora_modules(layout: Layout) -> dict[str, int]:
    """The modules of the base that plain LoRA adapts, and how many inputs each reads; none for other methods."""
    return {module_of(entry.name): entry.shape[1] for entry in layout.entries if entry.role == "A" and entry.name.endswith(FACTOR)}


def module_of(name: str) -> str:
    """The base's module that a LoRA tensor in PEFT's key form belongs to."""
    return name.removeprefix(PREFIX).removesuffix(FACTOR)


def _of_moments(known: Measure | None) -> dict[str, NDArray[Any]]:
    if known is None:
        return {}
    own, pool = known.own, known.pool
    spelled = {name: part.ngrams for name, part in (("ngrams", own), ("all", pool)) if part.ngrams.size}
    return {"mean": own.mean, "triangle": packed(own.covariance), "center": pool.mean, "within": packed(pool.covariance), **spelled}


def _moments(named: Modules, texts: Any) -> Measure | None:
    if not named:
        return None
    try:
        own, pool = map(float, texts)
        parts = (own, "mean", "triangle", "ngrams"), (pool, "center", "within", "all")
        return Measure(*(_part(count, named[mean], named[around], named.get(ngrams)) for count, mean, around, ngrams in parts))
    except (KeyError, TypeError, ValueError, AdapterError) as fault:
        raise AdapterError(f"{FILE}: moments of {texts!r} texts, {sorted(named)}, cannot be read: {fault}") from None


def _part(count: float, mean: Values, triangle: Values, ngrams: Values | None) -> Moments:
    covariance, spelled = unpacked(triangle), np.zeros(0) if ngrams is None else ngrams.astype(np.float64)
    if len(mean) != len(covariance) or not 1.0 <= count < np.inf or len(spelled) not in (0, BUCKETS):
        raise AdapterError(f"{count:g} texts, a mean of {len(mean)} values, a covariance of {len(covariance)}, {len(spelled)} n-grams")
    return Moments(count, mean.astype(np.float64), covariance, spelled)


def _learned(named: Modules, experts: Any) -> Learned | None:
    if not named:
        return None
    if set(named) != {"router"} or not isinstance(experts, list):
        raise AdapterError(f"{FILE}: {sorted(named)} over experts {str(experts)[:40]} is no trained router; it was not written by fedpeft")
    return checked(tuple(map(str, experts)), named["router"])


def _groups(tensors: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, Values]]:
    groups: dict[str, dict[str, Values]] = {kind: {} for kind in KINDS}
    for name, values in sorted(tensors.items()):
        kind, _, module = name.partition("/")
        axes, dtype = KINDS.get(kind, (0, None))
        if not (axes and module and values.ndim == axes and values.size and values.dtype == dtype and np.isfinite(values).all()):
            raise AdapterError(f"{FILE}: tensor {name!r} ({values.dtype}{list(values.shape)}) is none of {sorted(KINDS)} or not finite")
        groups[kind][module] = values.astype(np.float32)
    return groups


def _card(table: Any) -> Card:
    if not isinstance(table, dict):
        raise AdapterError(f"{FILE}: its card is a {type(table).__name__}, not a table")
    return Card.from_json(table)


def _scales(table: Any) -> dict[str, Scale]:
    try:
        found = {str(module): Scale(float(largest), float(frobenius)) for module, (largest, frobenius) in table.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise AdapterError(f"{FILE}: scale statistics are not pairs of numbers by module") from None
    wrong = [name for name, s in found.items() if not (isfinite(s.largest) and isfinite(s.frobenius) and min(s.largest, s.frobenius) >= 0)]
    if wrong:
        raise AdapterError(f"{FILE}: scales of {wrong[:3]} are not finite numbers of at least 0")
    return found


def _scale(scales: Mapping[str, Scale], module: str) -> Scale:
    if module not in scales:
        raise AdapterError(f"{FILE}: {module!r} has a spectrum and no scale; it was not written by fedpeft")
    return scales[module]


def _counts(table: Any) -> dict[str, tuple[float, ...]]:
    try:
        found = {str(router): tuple(map(float, values)) for router, values in table.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise AdapterError(f"{FILE}: counts are not lists of numbers by router") from None
    if any(len(values) != BINS or not all(0.0 <= value < np.inf for value in values) for values in found.values()):
        raise AdapterError(f"{FILE}: counts need {BINS} numbers of at least 0 for each router")
    return found
