"""Combine rules that hold when some sites lie (see README.md)."""

from __future__ import annotations

from fedpeft.schemes.robust.averages import RFA, FLTrust, NormBound, Rooted, rfa_by_sums, rfa_weight
from fedpeft.schemes.robust.buckets import INNER, Buckets
from fedpeft.schemes.robust.coordinates import Median, Trimmed
from fedpeft.schemes.robust.rule import CombineRule
from fedpeft.schemes.robust.selection import Bulyan, Krum, MultiKrum

COMBINES: dict[str, type[CombineRule]] = {**INNER, "buckets": Buckets, "fltrust": FLTrust}

__all__ = [
    "COMBINES",
    "RFA",
    "Buckets",
    "Bulyan",
    "CombineRule",
    "FLTrust",
    "Krum",
    "Median",
    "MultiKrum",
    "NormBound",
    "Rooted",
    "Trimmed",
    "rfa_by_sums",
    "rfa_weight",
]
