"""``[tasks.NAME]`` in federation.toml: a task with what is its own, or clusters of a task that nobody declared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from fedpeft import config
from fedpeft.config import Section
from fedpeft.schemes import ifca
from fedpeft_coordinator.starting import StartTable

MOST_CLUSTERS = 64


def _task_table(value: Any) -> Any:
    from fedpeft.tasks import TASKS

    return config.build(TASKS, value, "task")


class TaskEntry(Section):
    """One task, what of ``[training]`` differs for it, and its own ``start`` in place of the federation's."""

    task: Annotated[Any, BeforeValidator(_task_table)]
    training: dict[str, Any] = Field(default_factory=dict)
    start: StartTable = None


def named(tables: Any) -> Any:
    """The tables of all tasks, each with its name; clusters are tasks of their own.

    Raises:
        ValueError: a table is none, a number of clusters is out of range, or two tasks have one name.
    """
    if not isinstance(tables, Mapping):
        return tables
    made = [pair for name, table in tables.items() for pair in _entries(name, table)]
    twice = sorted({name for name, _ in made if [other for other, _ in made].count(name) > 1})
    if twice:
        raise ValueError(f"tasks: {twice} are there twice; clusters of a task are called by its name and a number")
    return dict(made)


def _entries(name: str, table: Any) -> list[tuple[str, Any]]:
    """The task, or its ``clusters``, of which each site takes one (`fedpeft.schemes.ifca`)."""
    if not isinstance(table, Mapping) or "clusters" not in table:
        return [(name, _entry(name, table))]
    count = table["clusters"]
    if type(count) is not int or not 2 <= count <= MOST_CLUSTERS:
        raise ValueError(f"tasks.{name}.clusters: is {count!r}; needs a whole number from 2 to {MOST_CLUSTERS}")
    own = {key: value for key, value in table.items() if key != "clusters"}
    return [(cluster, _entry(name, own)) for cluster in ifca.names(name, count)]


def _entry(name: str, table: Any) -> Any:
    if not isinstance(table, Mapping):
        raise ValueError(f"tasks.{name}: is {table!r}; needs a table with kind and labels")
    if "task" in table:
        return table
    beside = {key: table[key] for key in ("training", "start") if key in table}
    return {"task": {**{key: value for key, value in table.items() if key not in beside}, "name": name}, **beside}
