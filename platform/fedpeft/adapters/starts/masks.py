"""Where sparse deltas lie, from rows that the coordinator may see: by squared gradients (FISH mask) or a first training (LT-SFT)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from fedpeft.adapters.spec import Adapter, AdapterSpec
from fedpeft.errors import AdapterError
from fedpeft.methods.own.positions import modules, place

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedpeft.adapters.live import Live
    from fedpeft.adapters.starts.protocol import Samples
    from fedpeft.bases import Base
    from fedpeft.methods.own.scores import Scores
    from fedpeft.tasks import Batch


@dataclass(frozen=True)
class Fisher:
    """Positions of the largest sums of squared gradients over the samples (Sung et al. 2021, arXiv 2111.09839); any base will do."""

    kind: ClassVar[str] = "fisher"
    needs_samples: ClassVar[bool] = True

    def compute(self, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None = None) -> Adapter:
        """Round 0. Raises `AdapterError` without samples, or where the method has no positions that travel."""
        from fedpeft.methods.own.scores import squared_gradients

        def score(live: Live, given: Samples) -> Scores:
            # Examples of a language model are packed into one row, whose gradient is their sum.
            size = 1 if spec.head.kind == "lm" else given.batch_size
            batches = given.task.batches(given.data, size, seed, 0)
            return squared_gradients(live.model, modules(spec.layout), (given.task.loss(live.model, batch).total for batch in batches))

        return _placed(self.kind, base, spec, seed, samples, score)


@dataclass(frozen=True)
class Lottery:
    """Positions that ``steps`` of full training on the samples move most (Ansell et al. 2021, arXiv 2110.07560); a dense base.

    The weights are put back, bit for bit. The task's head trains along and is thrown away.
    """

    kind: ClassVar[str] = "lottery"
    needs_samples: ClassVar[bool] = True

    steps: Annotated[int, Field(ge=1)] = 100
    lr: Annotated[float, Field(gt=0)] = 5e-5

    def compute(self, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None = None) -> Adapter:
        """Round 0. Raises `AdapterError` without samples, on a quantized base, or where the method has no positions that travel."""
        from fedpeft.methods.own.scores import largest_changes

        def score(live: Live, given: Samples) -> Scores:
            live.train_roles(spec.layout.roles & {"head"})
            head = [live.parameters[entry.name] for entry in spec.layout.entries if entry.role == "head"]
            batches = islice(_endless(given, seed), self.steps)
            return largest_changes(live.model, modules(spec.layout), lambda weights: self._fit(live, given, batches, weights + head))

        return _placed(self.kind, base, spec, seed, samples, score)

    def _fit(self, live: Live, given: Samples, batches: Iterator[Batch], weights: list[nn.Parameter]) -> None:
        import torch

        optimizer = torch.optim.AdamW(weights, lr=self.lr)
        for batch in batches:
            live.grad.zero_()
            for weight in weights:
                if weight.grad is not None:
                    weight.grad.zero_()
            loss = given.task.loss(live.model, batch)
            total: Tensor = loss.total / max(loss.count, 1)
            torch.autograd.backward(total)
            optimizer.step()


def _placed(
    kind: str, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None, score: Callable[[Live, Samples], Scores]
) -> Adapter:
    from fedpeft.adapters.live import Live
    from fedpeft.adapters.making import initial

    if "index" not in spec.layout.roles:
        raise AdapterError(f"start {kind}: method {spec.method.kind} has no positions to place; use sparse-fisher or sparse-lottery")
    if samples is None or not len(samples.data):
        raise AdapterError(
            f'start {kind}: needs rows that the coordinator may see; name a file of them (start = {{kind = "{kind}", data = ...}}), '
            "or use method sparse-magnitude, which needs none"
        )
    first = initial(base, spec, seed)
    with Live.attach(base, spec) as live:
        live.load(first.tensors)
        live.model.eval()
        return Adapter(spec, place(first.tensors, score(live, samples)))


def _endless(given: Samples, seed: int) -> Iterator[Batch]:
    for epoch in count():
        yield from given.task.batches(given.data, given.batch_size, seed, epoch)
