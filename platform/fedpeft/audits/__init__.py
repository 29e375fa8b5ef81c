"""Attacks on what training gives away, run by the owner of the rows: empirical lower bounds beside what the accountant promises."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedpeft.audits.bounds import Finding, audit_scores, epsilon_bound, p_value

if TYPE_CHECKING:
    from fedpeft.audits.inversion import VIEWS, Inversion, View, invert
    from fedpeft.audits.membership import Coins, Membership, audit_membership, mislabelled
    from fedpeft.audits.subject import Subject

__all__ = [
    "VIEWS",
    "Coins",
    "Finding",
    "Inversion",
    "Membership",
    "Subject",
    "View",
    "audit_membership",
    "audit_scores",
    "epsilon_bound",
    "invert",
    "mislabelled",
    "p_value",
]

HOMES = {
    **dict.fromkeys(("VIEWS", "Inversion", "View", "invert"), "inversion"),
    **dict.fromkeys(("Coins", "Membership", "audit_membership", "mislabelled"), "membership"),
    "Subject": "subject",
}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"fedpeft.audits.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
