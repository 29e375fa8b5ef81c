"""What a federation does for its routers: the table ``[routing]``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from fedpeft.config import Section

Model = Annotated[str, Field(pattern=r"^[^@+]+$")]


class Routing(Section):
    """With ``gates``, sites train PHATGOOSE gates for ``steps`` steps beside the frozen adapter before every version is published.

    They also send histograms of their training rows' scores by gate and by Arrow, without which neither would ever abstain.

    With ``moments`` sites send second moments of their rows' embeddings once, which the router ``mahalanobis`` reads; not where
    ``privacy`` is on, since nothing pays for their release. With ``ngrams`` too they send counts of their texts' character n-grams beside
    them: by both, tasks and strangers are told apart better than by embeddings alone. ``encoder`` embeds rows and requests: ``base`` is
    the base itself, anything else a small model that every site gets by that name and allows (``policy.encoders``); several embed side
    by side.
    """

    encoder: Annotated[tuple[Model, ...], Field(min_length=1)] = ("base",)
    moments: bool = True
    ngrams: bool = True
    gates: bool = False
    steps: int = Field(default=100, ge=1)
    lr: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False)

    @field_validator("encoder", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("encoder")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"routing.encoder = {list(value)}: names one twice; the same embedding twice tells nothing more")
        return value
