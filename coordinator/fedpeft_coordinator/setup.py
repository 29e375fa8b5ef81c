"""A federation as its rounds see it: plain values and small callables, no torch, no configuration tree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeft.schemes import Gathers, Scheme, ServerOptimizer
from fedpeft.schemes.robust import CombineRule
from fedpeft.tensors import Layout, Tensors
from fedpeft.update import Counters

Scores = Callable[[Counters], Mapping[str, float]]


@dataclass(frozen=True)
class TaskSetup:
    """One task: what sites must know of it (JSON forms), its layout, its round-0 tensors with their seed, its metrics."""

    name: str
    layout: Layout
    task_json: str
    spec_json: str
    settings_json: str
    initial: Callable[[], Tensors]
    seed: int
    scores: Scores = lambda _counters: {}


@dataclass(frozen=True)
class Limits:
    """Who is asked and how long is waited (`fedpeft_coordinator.config.Cohort`), and what a site may claim and send."""

    min_sites: int = 1
    wait_for_sites: int = 1
    fraction: float = 1.0
    deadline: float = 600.0
    retries: int = 3
    reach: float = 2.0
    max_examples: int = 1_000_000
    root: str = ""


@dataclass(frozen=True)
class Setup:
    """Everything that rounds need and that does not change while they run.

    ``identity`` is the base that a site must hold (empty accepts any); ``combine`` None is the sum. ``facts`` is what may not
    change between two starts on one state folder; the journal remembers it, and ``renew`` brings what it remembers up to date.
    """

    name: str
    seed: int
    rounds: int
    tasks: Mapping[str, TaskSetup]
    scheme: Scheme
    scheme_json: str
    server: ServerOptimizer
    limits: Limits = Limits()
    evaluate_every: int = 0
    publish_every: int = 0
    identity: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    combine: CombineRule | None = None
    renew: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict

    @property
    def keeps_parts(self) -> bool:
        """Whether a round needs every site's part, not only their sum."""
        return isinstance(self.scheme, Gathers) or (self.combine is not None and not self.combine.sum_only)


def derive(seed: int, *parts: object) -> int:
    """A 62-bit seed for one purpose, from the federation's seed."""
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
