"""What a private job proves of itself before and while it runs, on the very model and rows at hand.

Elsewhere it was seen that gradients were clipped and noised that no optimizer ever read, and that rows of a batch mixed. Both
pass every test of the parts, and both are silent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedpeft.errors import PrivacyError
from fedpeft.training.dp_recorder import Recorder
from fedpeft.training.dp_sampling import batches_of
from fedpeft.training.dp_sums import RETREAT, add_weighted, record, singles
from fedpeft.training.modes import evaluating
from fedpeft.training.scaling import START, of_sum, scaled
from fedpeft.training.settings import TrainSettings

if TYPE_CHECKING:
    from fedpeft.adapters.live import Live
    from fedpeft.tasks import Batch, Encoded, Task

WEIGHTS = (1.0, -2.0, 0.5)
FULL, HALF = 1e-3, 0.1
"""Largest relative error of a sum of gradients; a base in bf16 or 4 bits rounds a lone example otherwise than one in a batch."""


def check(recorder: Recorder, live: Live, task: Task, data: Encoded) -> None:
    """Compare a few examples' recorded gradients with those of plain backwards of one example each, near the values at hand.

    Raises:
        PrivacyError: they differ: rows mix, or a trained tensor is used in a way that cannot be told apart.
    """
    if any(isinstance(module, _BatchNorm) and module.training for module in live.model.modules()):
        raise PrivacyError("example-level privacy: batch normalisation mixes the rows of a batch; set training.base_dropout = false")
    sizes = np.bincount(data.owners, data.lengths)
    chosen = np.argsort(sizes)[np.linspace(0, len(data) // 2, len(WEIGHTS)).astype(int)]
    batch = next(batches_of(task, data, np.unique(chosen), len(WEIGHTS)))
    start = live.flat.detach().clone()
    try:
        with evaluating(live.model):
            _stir(live)
            _compare(recorder, live, task, batch)
    finally:
        with torch.no_grad():
            live.flat.copy_(start)
        live.grad.zero_()
        recorder.found = {}


def moved(live: Live, trained: Mapping[str, nn.Parameter], before: Tensor, everything: bool) -> bool:
    """True when each of the ``trained`` tensors (or with a mask any of them) is another than ``before`` the step.

    Raises:
        PrivacyError: noise was added to a gradient that the optimizer did not read.
    """
    still = [name for name in trained if torch.equal(live.flat[live.spec.layout.spans[name]], before[live.spec.layout.spans[name]])]
    if still if everything else len(still) == len(trained):
        raise PrivacyError(
            f"example-level privacy: {len(still)} of {len(trained)} trained tensors did not move in a step, {still[0]} among them; "
            "the optimizer does not see the noisy gradients, so nothing that this job says of privacy would hold"
        )
    return True


def _stir(live: Live) -> None:
    """Move away from zeros, which hide the gradients of what they multiply."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        live.flat.add_(torch.randn(live.flat.shape, generator=generator).to(live.flat.device), alpha=0.02)


def _compare(recorder: Recorder, live: Live, task: Task, batch: Batch) -> None:
    settings, weights = TrainSettings(), torch.tensor(WEIGHTS)[: batch.examples].to(live.flat.device)
    live.grad.zero_()
    scale = START / RETREAT if scaled(settings, live.model, live.flat.device) else 1.0
    record(recorder, live, task, settings, batch, scale)
    squares = recorder.squares()
    add_weighted(recorder, live, weights)
    found, expected, norms = live.grad.clone(), torch.zeros_like(live.grad), []
    for weight, alone in zip(weights, singles(batch), strict=True):
        live.grad.zero_()
        loss = task.loss(live.model, alone)
        factor = of_sum(scale, loss.count) if scale > 1.0 else 1.0
        (loss.total * factor).backward()  # type: ignore[no-untyped-call]
        live.grad /= factor
        norms.append(live.grad.square().sum())
        expected.add_(live.grad * weight)
    bound = FULL if _full(live) else HALF
    off = float((found - expected).norm() / expected.norm().clamp(min=1e-12))
    apart = float(((squares - torch.stack(norms)).abs() / torch.stack(norms).clamp(min=1e-24)).max())
    if not (off <= bound and apart <= 2 * bound):
        raise PrivacyError(
            f"example-level privacy: gradients per example of method {recorder.method} are not those of the examples alone on this model; "
            "rows of a batch mix; use lora on a transformer base, or client-level privacy"
        )


def _full(live: Live) -> bool:
    """Whether the whole model computes in float32."""
    return all(parameter.dtype == torch.float32 for parameter in live.model.parameters())
