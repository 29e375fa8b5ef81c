"""Factors that all tasks of a group share: one A and many B (HydraLoRA, Tian et al. 2024, arXiv 2404.19245), or the mirror.

Each task has its own adapter; the shared factor has the same bits in all of a group's. In the rounds that move it, it moves by one step,
the mean over all the group's sites; every other factor moves within its task's cohort. One factor stands still at a time, so both
are exact. Sums of the tasks are all that is needed, so masks may hide the sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedpeft.errors import UpdateError
from fedpeft.factors import Product, difference, inner, norm, pairs
from fedpeft.tensors import Tensors

Share = Literal["A", "B", "both"]


@dataclass(frozen=True)
class Sharing:
    """Which factor a group's tasks share, and how much each task's rows count in the step of what is shared.

    A task of n rows has weight ``n ** (1 / temperature)``: 1 counts every row alike, infinity every task. ``report`` scores, in the
    rounds that move what is shared, every task with the step of its group and with the step of its own rows alone. After
    ``split_after`` such scores in a row that lost by it a task leaves its group for good (0: never). After round ``cluster_after``
    (0: never) groups are cut once into clusters of tasks whose adapters point the same way.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    share: Share = "A"
    temperature: Annotated[float, Field(ge=1.0)] = 2.0
    report: bool = False
    split_after: Annotated[int, Field(ge=0)] = 0
    cluster_after: Annotated[int, Field(ge=0)] = 0

    @property
    def roles(self) -> frozenset[str]:
        """The shared roles."""
        return frozenset("AB") if self.share == "both" else frozenset(self.share)

    def weights(self, rows: Mapping[str, float]) -> dict[str, float]:
        """The share of each task in a step, from the ``rows`` (weights) behind its mean; they sum to 1.

        Raises:
            UpdateError: a task has no rows.
        """
        if not rows or min(rows.values()) <= 0:
            raise UpdateError(f"sharing: rows of the tasks are {dict(rows)}; each task that takes part in a step has some")
        raised = {task: float(count) ** (1.0 / self.temperature) for task, count in sorted(rows.items())}
        total = sum(raised.values())
        return {task: value / total for task, value in raised.items()}

    def joint(self, means: Mapping[str, Tensors], rows: Mapping[str, float]) -> Tensors:
        """The common step of the shared roles among those that the ``means`` of the tasks hold, summed in float64 by order of name.

        Raises:
            UpdateError: the tasks' shared tensors differ in layout.
        """
        parts = {task: mean.pick(self.roles) for task, mean in sorted(means.items())}
        layouts = {part.layout.fingerprint for part in parts.values()}
        if len(layouts) > 1:
            raise UpdateError(f"sharing: tasks {sorted(parts)} have shared tensors of different shapes; one method puts the same on all")
        shares = self.weights({task: rows[task] for task in parts})
        total = sum((shares[task] * part.flat.astype(np.float64) for task, part in parts.items()), np.float64(0.0))
        return Tensors(next(iter(parts.values())).layout, np.asarray(total, np.float32))


def realign(stale: Tensors, shared: Tensors) -> tuple[Tensors, float]:
    """``stale`` with its group's ``shared`` factor, its own factor set so that the product changes least; and by how much it changed.

    With A shared, ``B' = B A A'+`` for the new A' (least squares): exact where the rows of A' span those of A, as after a change of gauge.
    The second value is ``||B' A' - B A|| / ||B A||`` over all modules, 0 where the product is zero or nothing of it is the task's own.

    Raises:
        AdapterError: the factors of a module do not fit.
    """
    whole = stale.patch(shared)
    own = frozenset("AB") - shared.layout.roles
    if not own:
        return whole, 0.0
    named, before = whole.named(), stale.named()
    lost, total = 0.0, 0.0
    for pair in pairs(stale.layout):
        old, new = Product(before[pair.b], before[pair.a]), Product(named[pair.b], named[pair.a])
        new = _fitted(old, new, "B" in own)
        named[pair.b][...], named[pair.a][...] = new.b, new.a
        lost, total = lost + norm(difference(new, old)) ** 2, total + inner(old, old)
    return whole, sqrt(lost / total) if total else 0.0


def _fitted(old: Product, new: Product, left: bool) -> Product:
    b, a = (np.asarray(factor, np.float64) for factor in old)
    if left:
        inverse = np.linalg.pinv(np.asarray(new.a, np.float64))
        return Product((b @ (a @ inverse)).astype(np.float32), new.a)
    inverse = np.linalg.pinv(np.asarray(new.b, np.float64))
    return Product(new.b, ((inverse @ b) @ a).astype(np.float32))
