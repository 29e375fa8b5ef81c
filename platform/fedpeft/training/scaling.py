"""Loss scaling: gradients that pass through fp16, whose smallest value is 6e-8, go through it multiplied by a power of two.

The scale is found while training (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2): a step whose gradients overflow is not done
and halves it, `WINDOW` steps in a row that are done double it. Powers of two scale exactly, so wherever nothing overflows and nothing is
rounded away (fp32 on a CPU) a scaled step is the step. A loss is never scaled itself: one that is not finite is the fault that it was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fedpeft.training.settings import TrainSettings

START, WINDOW, LEAST = 2.0**16, 1000, 1.0
"""The first scale, of a mean loss; steps in a row until it doubles; the smallest: gradients that overflow even there diverge."""
KEY = "(scale)"
"""What its state is called in a checkpoint."""

log = logging.getLogger(__name__)


class Scaler:
    """The scale of a job under way, and how many steps in a row it has held for."""

    def __init__(self) -> None:
        self.scale, self.held = START, 0

    def of_sum(self, terms: int) -> float:
        """What to multiply a loss summed over ``terms`` by: the scale of its mean, as a power of two."""
        return of_sum(self.scale, terms)

    def learn(self, number: int, finite: bool) -> None:
        """Step ``number`` (from 0) had gradients that were ``finite``, or is skipped. Raises `UpdateError` where no scale is left."""
        if finite:
            self.held += 1
            if self.held == WINDOW:
                self.scale, self.held = 2.0 * self.scale, 0
            return
        if self.scale <= LEAST:
            raise UpdateError(
                f"training: step {number + 1} has gradients that are not finite at loss scale {self.scale:g}, the last of all; "
                "lower training.lr, set training.precision = 'bf16' or 'fp32', or look for broken rows"
            )
        log.info("step %d is skipped: gradients overflow fp16 at loss scale %g; next is %g", number + 1, self.scale, self.scale / 2)
        self.scale, self.held = self.scale / 2, 0

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `restore` needs to go on."""
        return {KEY: np.array([self.scale, self.held], np.float64)}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` gave, if they did: a job may have begun on a device that scales nothing."""
        if KEY in arrays:
            self.scale, self.held = float(arrays[KEY][0]), int(arrays[KEY][1])


def of_sum(scale: float, terms: int) -> float:
    """The power of two at or below ``scale / terms``: a sum's gradients are those of the mean, as often as it has terms."""
    return scale / (1 << max(terms - 1, 0).bit_length())


def half_of(settings: TrainSettings, device: torch.device) -> torch.dtype | None:
    """What a model on ``device`` multiplies in: None is fp32, as on every CPU; bf16 is fp16 on cards that have no units for it."""
    import torch

    from fedpeft.bases.quantize import multiplies_bf16

    if settings.precision == "fp32" or device.type == "cpu":
        return None
    bf16 = settings.precision == "bf16" and (device.type != "cuda" or multiplies_bf16(str(device)))
    return torch.bfloat16 if bf16 else torch.float16


def scaled(settings: TrainSettings, model: nn.Module, device: torch.device) -> bool:
    """Whether gradients need scaling: with ``precision = "fp16"``, also where a CPU goes on in fp32, and on a base in fp16."""
    import torch

    in_fp16 = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    return in_fp16 or settings.precision == "fp16" or half_of(settings, device) == torch.float16
