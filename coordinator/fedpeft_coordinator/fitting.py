"""Whether scheme, method and combine rule can work together on an adapter's layout; refused before anything starts."""

from __future__ import annotations

from fedpeft.errors import ConfigError, PrivacyError, UpdateError
from fedpeft.privacy.settings import Client, check_phase
from fedpeft.schemes import Scheme
from fedpeft.schemes.base import linear
from fedpeft.schemes.robust import CombineRule
from fedpeft.tensors import Layout
from fedpeft.wire.codecs import choose
from fedpeft_coordinator import gating
from fedpeft_coordinator.config import FederationConfig
from fedpeft_coordinator.planning import fitting_ring

ROUNDS = range(1, 5)
"""Rounds of a task in which every phase of every scheme has come."""
COMBINED = frozenset({"probe"})
"""Roles beside the phase's that keep their meaning when parts are weighed anew."""


def check_fit(config: FederationConfig, layout: Layout) -> None:
    """Refuse what cannot hold on ``layout``.

    Raises:
        ConfigError: naming the two settings that clash, and what to do.
    """
    scheme, method = config.scheme, config.method
    try:
        scheme.check(layout)
    except UpdateError as fault:
        raise ConfigError(f"scheme.kind = {scheme.kind!r} and method.kind = {method.kind!r}: {fault}") from None
    if config.sharing is not None and not {"A", "B"} <= layout.roles:
        raise ConfigError(
            f"sharing.share = {config.sharing.share!r} and method.kind = {method.kind!r}: the method has no factors; take lora"
        )
    if config.routing.gates:
        gating.check(layout)
    if config.wire.budget is not None:
        _check_budget(config, layout, config.wire.budget)
    if config.combine is not None:
        _check_rule(scheme, config.combine, layout)
    if isinstance(config.privacy, Client):
        _check_noise(scheme, config.privacy, layout)


def _check_noise(scheme: Scheme, privacy: Client, layout: Layout) -> None:
    for phase in (scheme.phase(number, layout) for number in ROUNDS):
        beside = sorted(scheme.travels(layout, phase).roles - phase.roles)
        if beside:
            raise ConfigError(
                f"scheme.kind = {scheme.kind!r} and privacy.kind = {privacy.kind!r}: the scheme sends {beside} beside its deltas, which "
                "clipping and noise would spoil; take alternating, ffa or fedsb"
            )
        try:
            check_phase(privacy, linear(phase.roles & layout.roles), scheme.kind)
        except PrivacyError as fault:
            raise ConfigError(str(fault)) from None


def _check_budget(config: FederationConfig, layout: Layout, budget: int) -> None:
    for phase in (config.scheme.phase(number, layout) for number in ROUNDS):
        up = config.scheme.travels(layout, phase)
        if config.masks:
            fitting_ring(budget, up.subset(phase.roles).size, up.size, config.cohort.expected)
        else:
            choose(budget, up.size, masked=False)


def _check_rule(scheme: Scheme, rule: CombineRule, layout: Layout) -> None:
    clash = f"combine.kind = {rule.kind!r} and scheme.kind = {scheme.kind!r}"
    for phase in (scheme.phase(number, layout) for number in ROUNDS):
        beside = sorted(scheme.travels(layout, phase).roles - phase.roles - COMBINED)
        if beside:
            raise ConfigError(f"{clash}: the scheme sends {beside}, which mean something in a sum alone; set combine = 'sum'")
        try:
            rule.check(layout, phase)
        except UpdateError as fault:
            raise ConfigError(f"{clash}: {fault}") from None
