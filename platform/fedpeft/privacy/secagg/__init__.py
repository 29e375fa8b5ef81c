"""Secure aggregation: the coordinator learns the sum and nothing else (see README.md).

Bonawitz et al. 2017 (eprint 2017/281) over the sparse graph of Bell et al. 2020 (eprint 2020/704).
"""

from fedpeft.privacy.secagg.collector import Collector
from fedpeft.privacy.secagg.graph import LEAST, Shape, enough, neighbours, shape
from fedpeft.privacy.secagg.masks import Codes, apply_masks, keystream
from fedpeft.privacy.secagg.member import PURPOSE, Member, Pins, signer
from fedpeft.privacy.secagg.messages import Box, Bundle, Instance, Reveal, agreed

__all__ = [
    "LEAST",
    "PURPOSE",
    "Box",
    "Bundle",
    "Codes",
    "Collector",
    "Instance",
    "Member",
    "Pins",
    "Reveal",
    "Shape",
    "agreed",
    "apply_masks",
    "enough",
    "keystream",
    "neighbours",
    "shape",
    "signer",
]
