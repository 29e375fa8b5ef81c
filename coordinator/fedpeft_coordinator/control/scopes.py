"""A registry as a caller sees it whose scope is some tasks: the others are not there for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedpeft.registry import Registry
from fedpeft.registry.histories import Histories
from fedpeft_coordinator.control.gate import Caller


def seen_by(caller: Caller, registry: Registry) -> Registry:
    """``registry`` with the tasks of ``caller``'s scope."""
    return registry if caller.tasks is None else replace(registry, lists=Scoped(registry.histories, caller))


@dataclass(frozen=True)
class Scoped:
    """The histories of the tasks that ``caller`` may see; all raise `DeniedError` for another's, whether there is such a task or not."""

    inner: Histories
    caller: Caller

    def where(self, name: str) -> str:
        """As it is."""
        return self.inner.where(name)

    def lines(self, name: str) -> list[bytes]:
        """Of a task in scope."""
        self.caller.permit(_task(name))
        return self.inner.lines(name)

    def append(self, name: str, count: int, line: bytes) -> bool:
        """To a task in scope."""
        self.caller.permit(_task(name))
        return self.inner.append(name, count, line)

    def names(self) -> tuple[str, ...]:
        """Those of tasks in scope."""
        return tuple(name for name in self.inner.names() if self.caller.sees(_task(name)))

    def stamp(self) -> object:
        """Of all of them."""
        return self.inner.stamp()


def _task(name: str) -> str:
    """The task of list ``refs/TASK/log`` or ``refs/TASK/aliases``."""
    return name.split("/")[1]
