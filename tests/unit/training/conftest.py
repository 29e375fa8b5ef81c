"""A tiny live adapter and task with the contract's surface: a two-factor regression whose every value is known; a small real one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.unit.training.private import TASK, place
from torch import nn

from fedpeft.adapters import attach, make_spec
from fedpeft.adapters.live import Live
from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft.methods import Lora
from fedpeft.tensors import Entry, Layout


class Toy(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(width, width, bias=False).requires_grad_(False)
        self.lora_dropout = nn.Dropout(0.1)
        self.A, self.B = nn.Parameter(torch.empty(2, width)), nn.Parameter(torch.empty(width, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_dropout(x) @ self.A.T @ self.B.T


class ToyLive:
    """Parameters are views of ``flat``, their gradients views of ``grad``."""

    def __init__(self, width: int = 5, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(Toy(width), nn.Dropout(0.2))
        layout = Layout.of([Entry("A", "a", (2, width)), Entry("B", "b", (width, 2))])
        self.spec = SimpleNamespace(layout=layout, schema="toy", method=None)
        self.base = None
        self.flat, self.grad = torch.randn(layout.size) * 0.3, torch.zeros(layout.size)
        for name, param in (("a", self.model[0].A), ("b", self.model[0].B)):
            param.data = self.flat[layout.spans[name]].view(param.shape)
            param.grad = self.grad[layout.spans[name]].view(param.shape)

    def train_roles(self, roles: frozenset[str]) -> None:
        self.model[0].A.requires_grad_("A" in roles)
        self.model[0].B.requires_grad_("B" in roles)


@dataclass(frozen=True)
class ToyBatch:
    x: torch.Tensor
    y: torch.Tensor

    @property
    def examples(self) -> int:
        return len(self.x)

    tokens = examples


@dataclass(frozen=True)
class ToyTask:
    name: str = "toy"
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def batches(self, data: torch.Tensor, size: int, seed: int, epoch: int) -> Iterator[ToyBatch]:
        order = np.random.default_rng((seed, epoch)).permutation(len(data))
        for start in range(0, len(order), size):
            rows = data[torch.from_numpy(order[start : start + size])]
            self.seen.append(tuple(order[start : start + size].tolist()))
            yield ToyBatch(rows[:, 0], rows[:, 1])

    def loss(self, model: nn.Module, batch: ToyBatch) -> SimpleNamespace:
        errors = (model(batch.x) - batch.y).square().sum(-1)
        return SimpleNamespace(total=errors.sum(), count=len(batch.x))

    def evaluate(self, model: nn.Module, data: torch.Tensor, base: object) -> dict[str, tuple[float, ...]]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"loss": (float((model(data[:, 0]) - data[:, 1]).square().sum()),), "count": (float(len(data)),)}


@pytest.fixture(scope="session")
def toy_live():
    return ToyLive


@pytest.fixture(scope="session")
def toy_task():
    return ToyTask


@pytest.fixture(scope="session")
def toy_data() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(23, 2, 5)).astype(np.float32))


@pytest.fixture(scope="module")
def causal(shared_models: Path) -> Base:
    """A real causal model of 260k parameters."""
    return load_base(BaseSpec(str(shared_models / "stories260k"), max_tokens=128), "cpu")


@pytest.fixture
def live(causal: Base) -> Iterator[Live]:
    """It with a small LoRA at values none of which is zero."""
    spec = make_spec("t", causal, Lora(r=4, alpha=4), TASK.head)
    with attach(causal, spec) as found:
        place(found)
        yield found
