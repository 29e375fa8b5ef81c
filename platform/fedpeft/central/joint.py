"""Several adapters on one base as one thing to train: what the loop needs of an adapter at work, and of a task.

Every adapter takes part in every backward on every rank, whatever the batch holds (`Bank.attach(..., dense=True)`): an adapter that is
switched off keeps stale gradients or mixes others' under ZeRO, without an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedpeft.adapters import Adapter
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.bases.base import Base
from fedpeft.bases.spec import HeadSpec
from fedpeft.central.pool import Part, Places, Pool
from fedpeft.central.sampling import Going, dealt, windows
from fedpeft.errors import AdapterError
from fedpeft.mixtures import Bank, Gates
from fedpeft.tasks.likelihood import packs, single_forward
from fedpeft.tasks.protocol import Encoded
from fedpeft.tensors import Entry, Layout


@dataclass(frozen=True)
class JointSpec:
    """What the loop asks of a spec; ``layout`` names tensors ``adapter/name``."""

    task: str
    layout: Layout
    schema: str
    method: Any


class Joint:
    """A bank whose adapters train together; leaving the ``with`` block takes them off."""

    def __init__(self, name: str, bank: Bank, pool: Pool) -> None:
        self.bank, self.base, self.pool = bank, bank.base, pool
        self.specs: dict[str, AdapterSpec] = {adapter: bank.spec(adapter) for adapter in bank.names}
        entries = [Entry(e.role, f"{adapter}/{e.name}", e.shape) for adapter, spec in self.specs.items() for e in spec.layout.entries]
        schema = hashlib.sha256("\n".join(f"{adapter} {spec.schema}" for adapter, spec in self.specs.items()).encode()).hexdigest()
        self.spec = JointSpec(name, Layout.of(entries), schema, next(iter(self.specs.values())).method)
        self.model = JointModel(bank, pool)

    @staticmethod
    def attach(name: str, base: Base, pool: Pool, adapters: Mapping[str, Adapter], shared: Adapter | None = None) -> Joint:
        """Put one adapter per task of ``pool`` on ``base``, and one that acts on all rows. Raises `AdapterError` as `Bank.attach`."""
        head = adapters[pool.names[0]].spec.head if not pool.generative else HeadSpec("lm")
        return Joint(name, Bank.attach(base, head, adapters, shared, dense=True), pool)

    @property
    def flat(self) -> torch.Tensor:
        """All values (P,), adapter by adapter: a copy, of values that no engine has moved yet."""
        return torch.cat([self.bank.flat(adapter) for adapter in self.specs])

    def train_roles(self, roles: Collection[str]) -> None:
        """All roles train; to train some alone would leave parameters out of backward. Raises `AdapterError` when ``roles`` are others."""
        if set(roles) != self.spec.layout.roles:
            raise AdapterError(f"{self.spec.task}: a joint job trains all roles {sorted(self.spec.layout.roles)}, not {sorted(roles)}")

    def split(self) -> torch.Tensor:
        """From now on the shared adapter's gradients lie apart by task, (T, P). Raises `AdapterError` when none is shared."""
        self.model.split = True
        return self.bank.split(len(self.pool.names))

    def __enter__(self) -> Joint:
        return self

    def __exit__(self, *_: object) -> None:
        self.bank.detach()


class JointModel(nn.Module):
    """From a part of a batch to the summed loss of each task (T,)."""

    def __init__(self, bank: Bank, pool: Pool) -> None:
        super().__init__()
        self.inner = bank.model
        self.bank, self.pool = bank, pool
        self.split = False

    def forward(self, part: Part) -> torch.Tensor:
        """Sums (T,) in nats; the gates stay set until the next part, so that recomputed layers see them."""
        device = self.bank.store.device
        owners = part.owners.to(device)
        self._use(part)
        if self.pool.generative:
            whose = owners if owners.dim() == 2 else owners[:, None].expand(part.batch.labels.shape)
            losses, owners = single_forward(self.inner, part.batch), whose[part.batch.labels.to(device) != -100]
        else:
            inputs = {name: value.to(device) for name, value in part.batch.inputs.items()}
            logits = self.inner(**inputs).logits.float()
            losses = nn.functional.cross_entropy(logits, part.batch.labels.to(device), reduction="none")
        return losses.new_zeros(len(self.pool.names)).index_add(0, owners, losses)

    def _use(self, part: Part) -> None:
        """One adapter a token of a packed row, or a row of padded sequences."""
        names, owners = self.pool.names, part.owners
        if owners.dim() == 2 and packs(self.inner):
            gates = Gates.tokens(names, nn.functional.one_hot(owners, len(names)).float())
        else:
            owners = owners[part.batch.inputs["position_ids"] == 0] if owners.dim() == 2 else owners
            gates = Gates.rows([names[owner] for owner in owners.tolist()])
        self.bank.use(gates, lanes=owners.flatten().tolist() if self.split else None)


@dataclass(frozen=True, eq=False)
class Mixed:
    """One micro-batch of all ranks together: numbers of examples in the pool."""

    pool: Pool
    picks: Places

    @property
    def examples(self) -> int:
        """How many."""
        return len(self.picks)

    @property
    def tokens(self) -> int:
        """Their tokens, no padding."""
        return int(self.pool.lengths_of(self.picks).sum())

    def part(self, rank: int, ranks: int) -> Part:
        """What ``rank`` computes of it."""
        return self.pool.part(dealt(self.pool, self.picks, ranks)[rank])


@dataclass(frozen=True)
class JointTask:
    """The tasks of a pool as one: ``batches`` are mixed, by ``shares``; ``accumulate`` of them make a step.

    ``going`` says which tasks take part in a step (None: all); it is asked when the step's first batch is.
    """

    name: str
    pool: Pool
    shares: Mapping[str, float]
    accumulate: int
    going: Going | None = None

    def batches(self, data: Encoded, size: int, seed: int, epoch: int) -> Iterator[Mixed]:
        """Endless, so there is one epoch; micro-batches of ``size`` examples."""
        for picks in windows(self.pool, self.shares, size * self.accumulate, seed, self.going):
            yield from (Mixed(self.pool, picks[start : start + size]) for start in range(0, len(picks), size))
