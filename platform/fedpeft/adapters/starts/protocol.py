"""What a start must answer; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    from fedpeft.adapters.spec import Adapter, AdapterSpec
    from fedpeft.bases import Base
    from fedpeft.tasks import Encoded, Task


@dataclass(frozen=True)
class Samples:
    """Rows that the coordinator may see: a task, its encoded rows, and how many go through the base at once."""

    task: Task
    data: Encoded
    batch_size: int = 8


class Start(Protocol):
    """A rule for the tensors of round 0: a frozen dataclass, listed in ``STARTS``."""

    kind: ClassVar[str]
    needs_samples: ClassVar[bool]

    def compute(self, base: Base, spec: AdapterSpec, seed: int, samples: Samples | None) -> Adapter:
        """The round-0 adapter of ``spec`` on ``base``, a function of its arguments alone.

        Raises:
            AdapterError: it does not fit the method or the base, or lacks samples.
        """
        ...


@runtime_checkable
class Files(Protocol):
    """A start that reads adapter folders."""

    def rooted(self, folder: Path) -> Self:
        """With relative paths taken from ``folder``."""
        ...
