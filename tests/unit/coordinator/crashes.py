"""Coordinators of fake federations that die: at a commit, at every commit, or with the process that they run in."""

from __future__ import annotations

from itertools import count
from typing import Any


class Crash(BaseException):
    """Stands for kill -9: nothing catches it."""


def crash_at(coordinator: Any, point: int, before: bool) -> None:
    """Let ``coordinator`` die at a commit, counted from 1: before it is written, or after."""
    save, seen = coordinator.journal.save, count(1)

    def crash(step: object) -> None:
        dies = next(seen) == point
        if not (dies and before):
            save(step)
        if dies:
            raise Crash

    coordinator.journal.save = crash


def crash_everywhere(federation: Any) -> int:
    """Run to the end though a coordinator dies before and after each commit, so that none lives longer than a step; how often one died."""
    for crashes in count():
        coordinator = federation.open()
        crash_at(coordinator, 1, before=crashes % 2 == 0)
        try:
            coordinator.run()
        except Crash:
            continue
        return crashes
    raise AssertionError
