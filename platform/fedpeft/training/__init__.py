"""Training and evaluation of one adapter: settings, one loop, engines, checkpoints.

The settings are plain values and load at once; what needs torch is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedpeft.training.settings import TrainJob, TrainResult, TrainSettings

if TYPE_CHECKING:
    from fedpeft.training.loop import ENGINES, evaluate, train

__all__ = ["ENGINES", "TrainJob", "TrainResult", "TrainSettings", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    if name in ("ENGINES", "evaluate", "train"):
        return getattr(import_module("fedpeft.training.loop"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
