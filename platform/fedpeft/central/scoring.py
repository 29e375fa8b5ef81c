"""Scores of a job's adapters on their tasks' test rows, while it trains: by all ranks, on the model that they share.

Rows are split over the ranks and counters, which are sums, are added, so the numbers are those of one process. In ZeRO stage 3 a forward is
a meeting of all ranks, and they need different numbers of them: `Lockstep` lets who is done take part in the others'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from fedpeft.bases.base import Base
from fedpeft.central.together import add_up
from fedpeft.central.world import World
from fedpeft.errors import ConfigError, DataError
from fedpeft.mixtures import Bank, Gates
from fedpeft.tasks import Encoded, Generation, read_rows
from fedpeft.tasks.arrange import subset
from fedpeft.tasks.rows import stream_rows
from fedpeft.training.modes import evaluating

if TYPE_CHECKING:
    from fedpeft.tasks import Counters, Row, Task
    from fedpeft.training.config import CentralConfig, CentralTask


class Served(nn.Module):
    """A bank as the model of one task: every row of whatever it is called with goes through that task's adapter."""

    def __init__(self, bank: Bank, task: str, labels: int) -> None:
        super().__init__()
        self.inner = bank.model
        self.bank, self.task, self.labels = bank, task, labels

    def forward(self, **inputs: Any) -> Any:
        """What the task's own model would answer."""
        self._use(inputs)
        out = self.inner(**inputs)
        if self.labels:
            out.logits = out.logits[:, : self.labels]
        return out

    def generate(self, **inputs: Any) -> Any:
        """As ``transformers``."""
        self._use(inputs)
        return cast(Any, self.inner).generate(**inputs)

    def get_base_model(self) -> nn.Module:
        """The model whose forward this one's is."""
        return self.inner

    def get_output_embeddings(self) -> Any:
        """The base's output layer."""
        return cast(Any, self.inner).get_output_embeddings()

    def _use(self, inputs: Mapping[str, Any]) -> None:
        self.bank.use(Gates.rows([self.task] * len(next(iter(inputs.values())))))


@dataclass(frozen=True)
class Lockstep:
    """Within `held`, a call of ``model`` on one rank is one on all: a rank that is done calls it on nothing until all are."""

    model: nn.Module
    bank: Bank
    task: str
    device: str

    @contextmanager
    def held(self) -> Iterator[None]:
        """All ranks enter and leave together."""
        hook = self.model.register_forward_pre_hook(lambda *_: self._busy(1) and None)
        try:
            yield
        finally:
            hook.remove()
        while self._busy(0):
            self.bank.use(Gates.rows([self.task]))
            self.model(**self._nothing())

    def _nothing(self) -> dict[str, torch.Tensor]:
        """The least that a forward takes; an encoder-decoder's classifier looks for an end token."""
        base, one = self.bank.base, torch.ones(1, 1, dtype=torch.long, device=self.device)
        if base.processor is not None:
            return {"pixel_values": torch.zeros(1, 3, *base.processor.size, dtype=torch.uint8, device=self.device)}
        if base.family != "seq2seq":
            return {"input_ids": one, "attention_mask": one}
        end = one * int(base.config.eos_token_id)
        return {"input_ids": end, "attention_mask": one, "decoder_input_ids": end}

    def _busy(self, calls: int) -> int:
        """On how many ranks the model is about to be called."""
        count = torch.tensor(calls, device=self.device)
        torch.distributed.all_reduce(count)
        return int(count)


@dataclass(frozen=True)
class Scorer:
    """Scores the adapters of ``bank`` for ``tasks`` on ``tests``, the examples of each (None: it has none); in stage 3 ``partitioned``."""

    bank: Bank
    world: World
    partitioned: bool
    tasks: Mapping[str, Task]
    tests: Mapping[str, Encoded | None]

    @staticmethod
    def of(config: CentralConfig, bank: Bank, world: World, partitioned: bool) -> Scorer:
        """On the tasks' test rows, which are read.

        Raises:
            DataError: a row is of an unknown form.
            ConfigError: ranks that share an encoder-decoder would have to generate.
        """
        tasks = {name: entry.task for name, entry in config.tasks.items()}
        found = Scorer(bank, world, partitioned, tasks, {name: _tests(entry, bank.base) for name, entry in config.tasks.items()})
        found.require_forwards()
        return found

    def require_forwards(self) -> None:
        """Raise `ConfigError` when ranks that share an encoder-decoder would have to generate: its encoder is then called by itself."""
        alone = not self.partitioned or self.world.size == 1 or self.bank.base.family != "seq2seq"
        wanted = [name for name, task in self.tasks.items() if self.tests[name] is not None and _generates(task)]
        if wanted and not alone:
            raise ConfigError(
                f"tasks {wanted}: ranks that share an encoder-decoder in stage 3 cannot generate answers; "
                "set metrics = ['perplexity'], or deepspeed.stage = 2"
            )

    def __call__(self) -> dict[str, dict[str, float]]:
        """Scores by task, the same on all ranks; none where a task has no examples. Every rank calls it at once."""
        return {name: {} if data is None else self._scores(self.tasks[name], data) for name, data in self.tests.items()}

    def _scores(self, task: Task, data: Encoded) -> dict[str, float]:
        own = subset(data, np.arange(self.world.rank, len(data), self.world.size), task.head.kind == "lm")
        model = Served(self.bank, task.name, len(task.head.labels))
        meeting = self.partitioned and self.world.size > 1
        lock = Lockstep(self.bank.model, self.bank, task.name, self.world.device).held() if meeting else nullcontext()
        with evaluating(model), torch.no_grad(), lock:
            counters = _counters(task, _generated(task, len(data), self.world), own, model, self.bank.base)
        return task.scores(summed(counters, self.world))


def summed(counters: Counters, world: World) -> Counters:
    """Counters of all ranks together."""
    if world.size == 1:
        return counters
    values = torch.tensor([value for name in sorted(counters) for value in counters[name]], dtype=torch.float64, device=world.device)
    add_up(world, values)
    rest = iter(values.tolist())
    return {name: tuple(next(rest) for _ in counters[name]) for name in sorted(counters)}


def has_tests(entry: CentralTask) -> bool:
    """Whether a task has test rows."""
    return next(iter(_test_rows(entry)), None) is not None


def _tests(entry: CentralTask, base: Base) -> Encoded | None:
    """All test examples of a task, in memory; None where there are none."""
    rows = list(_test_rows(entry))
    return cast(Encoded, entry.task.encode(rows, base)) if rows else None


def _test_rows(entry: CentralTask) -> Iterator[Row]:
    try:
        yield from stream_rows(entry.data, "test") if entry.stream else read_rows(entry.data, "test")
    except DataError:
        return


def _generates(task: Task) -> bool:
    """Whether a metric of ``task`` needs text."""
    return "generated" in task.counted


def _generated(task: Task, examples: int, world: World) -> int:
    """How many of this rank's examples are among those whose answers one process would generate: its first ``samples``."""
    return len(range(world.rank, min(examples, task.samples), world.size)) if isinstance(task, Generation) else 0


def _counters(task: Task, samples: int, data: Encoded, model: nn.Module, base: Base) -> Counters:
    """All counters of ``task`` over ``data``, zeros where this rank has none of the examples."""
    zeros = {name: (0.0,) * count for name, count in task.counted.items()}
    if not len(data):
        return zeros
    if isinstance(task, Generation):
        task = replace(task, samples=samples) if samples else replace(task, metrics=("perplexity",))
    return zeros | dict(task.evaluate(model, data, base))
