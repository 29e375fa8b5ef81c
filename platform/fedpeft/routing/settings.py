"""What a federation does for its routers: the table ``[routing]``."""

from __future__ import annotations

from pydantic import Field

from fedpeft.config import Section


class Routing(Section):
    """With ``gates``, sites train PHATGOOSE gates for ``steps`` steps beside the frozen adapter before every version is published.

    They also send histograms of their training rows' scores by gate and by Arrow, without which neither would ever abstain.
    """

    gates: bool = False
    steps: int = Field(default=100, ge=1)
    lr: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False)
