"""Scores of a job's adapters on their tasks' test rows, each beside the shared adapter where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from fedpeft.adapters import Adapter
from fedpeft.bases import load_base
from fedpeft.bases.base import Base
from fedpeft.errors import DataError
from fedpeft.mixtures import Bank, Gates
from fedpeft.tasks import read_rows
from fedpeft.training.modes import evaluating

if TYPE_CHECKING:
    from fedpeft.central.job import Prepared
    from fedpeft.tasks import Task
    from fedpeft.training.config import CentralConfig


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
        self.bank.use(Gates.rows([self.task] * len(inputs["input_ids"])))


def scored(config: CentralConfig, ready: Prepared, every: Mapping[str, Adapter], device: str = "auto") -> dict[str, dict[str, float]]:
    """Scores by task of the adapters ``every``; a task without test rows has none."""
    from fedpeft.mixtures.bank import SHARED

    base = load_base(config.base, device)
    own = {name: every[name] for name in ready.adapters}
    found: dict[str, dict[str, float]] = {}
    with Bank.attach(base, next(iter(own.values())).spec.head, own, every.get(SHARED)) as bank:
        for name, entry in config.tasks.items():
            found[name] = _scores(bank, entry.task, entry.data, base)
    return found


def _scores(bank: Bank, task: Task, source: Any, base: Base) -> dict[str, float]:
    import torch

    try:
        rows = read_rows(source, "test")
    except DataError:
        return {}
    model = Served(bank, task.name, len(task.head.labels))
    with evaluating(model), torch.no_grad():
        return task.scores(task.evaluate(model, task.encode(rows, base), base))
