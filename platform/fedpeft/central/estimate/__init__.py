"""What a central job needs of each rank's GPU, host and disk under every ZeRO stage and offload, from its base's ``config.json`` alone."""

from __future__ import annotations

from fedpeft.central.estimate.plans import Estimate, Plan, Room, estimated, plan_of
from fedpeft.central.estimate.recommending import Advice, advise, plans

__all__ = ["Advice", "Estimate", "Plan", "Room", "advise", "estimated", "plan_of", "plans"]
