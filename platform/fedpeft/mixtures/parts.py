"""What each method's tensors do to the module that hosts them, and the methods that no mixture is exact for.

A part is the effect of one adapter on one module, by the names of its tensors. Effects add up: gains as ``1 + sum w (l - 1)``,
biases as ``b + sum w (b_e - b)``, low-rank products and bottlenecks as what they add.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.errors import AdapterError
from fedpeft.methods.values import PREFIX
from fedpeft.tensors import Entry

LOW = {".lora_A.weight": (0, 0), ".lora_B.weight": (0, 1), ".lora_A2.weight": (1, 0), ".lora_B2.weight": (1, 1)}
SQUEEZE = ("down.weight", "down.bias", "up.weight", "up.bias")


@dataclass(frozen=True)
class Experts:
    """Names of low-rank experts and of the router that weighs them token by token: the ``top`` largest by their softmax (0: all).

    ``down``: A (r, in), of each expert or one for all; ``up``: B (out, r) of each; ``router`` (experts, in).
    """

    down: tuple[str, ...]
    up: tuple[str, ...]
    router: str
    top: int = 0


@dataclass(frozen=True)
class Part:
    """Names of an adapter's tensors at one module, by what they do there.

    ``low``: pairs (A (r, in), B (out, r)); ``gain_in`` (1, in) and ``gain_out`` (out, 1); ``shift`` (out,), the bias that replaces the
    base's; ``squeeze``: a bottleneck's down (dim, out) and up (out, dim), each with its bias; ``experts``: a mixture of its own.
    """

    low: tuple[tuple[str, str], ...] = ()
    gain_in: str | None = None
    gain_out: str | None = None
    shift: str | None = None
    squeeze: tuple[str, str, str, str] | None = None
    experts: Experts | None = None

    @property
    def names(self) -> list[str]:
        """All tensors."""
        single = [name for name in (self.gain_in, self.gain_out, self.shift) if name is not None]
        mixed = [*self.experts.down, *self.experts.up, self.experts.router] if self.experts else []
        return [*single, *(name for pair in self.low for name in pair), *(self.squeeze or ()), *mixed]


Parts = dict[str, Part]


def parts_of(spec: AdapterSpec) -> Parts:
    """Module name -> part, for all of the adapter but its head and virtual tokens.

    Raises:
        AdapterError: no mixture is exact for the method, or for this setting of it.
    """
    kind = spec.method.kind
    if kind not in READERS:
        raise AdapterError(
            f"adapter {spec.task}: {kind} cannot be mixed in one batch; a mixture takes {sorted(READERS)}, or serve it alone"
        )
    if getattr(spec.method, "dora", False):
        raise AdapterError(
            f"adapter {spec.task}: DoRA cannot be mixed: it rescales the base's own rows; train lora without dora, or serve it alone"
        )
    balance = getattr(spec.method, "balance", 0.0)
    if balance:
        raise AdapterError(
            f"adapter {spec.task}: {kind} with balance = {balance:g} cannot be mixed: its balancing loss is over all tokens "
            "of a batch, whoever they are of; set method.balance = 0, or train it alone"
        )
    found = READERS[kind]([entry for entry in spec.layout.entries if entry.role != "head"])
    top = getattr(spec.method, "top", 0)
    return {host: replace(part, experts=replace(part.experts, top=top)) if part.experts else part for host, part in found.items()}


def _low(entries: list[Entry]) -> Parts:
    found: dict[str, list[list[str]]] = {}
    for entry in entries:
        tail = next(tail for tail in LOW if entry.name.endswith(tail))
        product, factor = LOW[tail]
        found.setdefault(_host(entry.name, tail), [["", ""], ["", ""]])[product][factor] = entry.name
    return {host: Part(low=tuple((a, b) for a, b in products if a)) for host, products in found.items()}


def _gains(entries: list[Entry]) -> Parts:
    inner = {entry.name: entry.shape[0] == 1 for entry in entries}
    return {_host(name, ".ia3_l"): Part(gain_in=name) if into else Part(gain_out=name) for name, into in inner.items()}


def _shifts(entries: list[Entry]) -> Parts:
    return {_host(entry.name, ".bias"): Part(shift=entry.name) for entry in entries}


def _squeezes(entries: list[Entry]) -> Parts:
    hosts = sorted({_host(entry.name, "").partition(".bottleneck.")[0] for entry in entries})
    a, b, c, d = SQUEEZE
    stems = {host: f"{PREFIX}{host}.bottleneck." for host in hosts}
    return {host: Part(squeeze=(stem + a, stem + b, stem + c, stem + d)) for host, stem in stems.items()}


def _mixtures(kind: str, entries: list[Entry]) -> Parts:
    hosts: dict[str, list[str]] = {}
    for entry in entries:
        host, _, leaf = entry.name.partition(f".{kind}.")
        hosts.setdefault(host, []).append(leaf)
    return {_host(host, ""): Part(experts=_experts(f"{host}.{kind}.", leaves)) for host, leaves in hosts.items()}


def _experts(stem: str, names: list[str]) -> Experts:
    """Those of one module, in the order of their numbers."""
    down, up = ([name for name in names if name.partition(".")[0] == letter] for letter in "AB")
    numbered = [tuple(stem + name for name in sorted(part, key=lambda name: int(name[2:] or 0))) for part in (down, up)]
    return Experts(numbered[0], numbered[1], stem + "router")


def _soft(entries: list[Entry]) -> Parts:
    """Virtual tokens act on no module but the trunk's call (`soft`)."""
    return {}


def _host(name: str, tail: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(tail)


READERS: dict[str, Callable[[list[Entry]], Parts]] = {
    "lora": _low,
    "ia3": _gains,
    "bitfit": _shifts,
    "bottleneck": _squeezes,
    "prompt": _soft,
    "prefix": _soft,
    "hydralora": partial(_mixtures, "hydralora"),
    "molora": partial(_mixtures, "molora"),
}
"""The methods that a mixture is exact for."""
