"""The embedded data: what it is, that it is the same every time, uneven over sites, and learnable."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.bases import Base
from fedpeft.errors import DataError
from fedpeft.tasks import Source, read_rows
from fedpeft.tasks.stdlib import CAP, HOLDS, STDLIB_LABELS, STDLIB_QUESTIONS, masked, sites, stdlib_rows
from fedpeft.tasks.stdlib_sources import MODULES, effect, sentences


def test_rows_have_the_agreed_fields_and_labels() -> None:
    rows = stdlib_rows()
    assert {tuple(row) for row in rows} == {("task", "client", "split", "text", "label")}
    for task, labels in STDLIB_LABELS.items():
        mine = stdlib_rows(task)
        assert mine == [row for row in rows if row["task"] == task]
        assert 300 < len(mine) < 4000
        assert {row["label"] for row in mine} == set(labels)
        assert {row["client"] for row in mine} == {client for client, tasks in HOLDS.items() if task in tasks}
        assert all(row["text"].startswith(STDLIB_QUESTIONS[task] + " ") for row in mine)
        assert {row["label"] for row in mine if row["split"] == "test"} == set(labels)
        share = Counter(row["split"] for row in mine)["test"] / len(mine)
        assert 0.1 < share < 0.3
    assert max(Counter((row["task"], row["client"], row["label"]) for row in rows).values()) <= CAP


def test_no_text_twice_in_a_task_and_one_side_of_the_split_for_a_passage() -> None:
    rows = stdlib_rows()
    assert len({(row["task"], row["text"]) for row in rows}) == len(rows)
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["text"].removeprefix(STDLIB_QUESTIONS[row["task"]]), set()).add(row["split"])
    assert max(map(len, sides.values())) == 1


def test_another_process_reads_the_same_rows_and_imports_none_of_the_modules() -> None:
    code = """
        import sys, hashlib, json
        from fedpeft.tasks.stdlib import stdlib_rows
        rows = stdlib_rows()
        print(hashlib.sha256(json.dumps(rows).encode()).hexdigest(), sorted({"mailbox", "turtle", "torch", "sqlite3"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{hashlib.sha256(json.dumps(stdlib_rows()).encode()).hexdigest()} []\n"


def test_callers_cannot_spoil_the_rows_of_others() -> None:
    stdlib_rows()[0]["label"] = "changed"
    assert stdlib_rows()[0]["label"] != "changed"


def test_sites_hold_the_tasks_unevenly() -> None:
    for n in range(1, len(HOLDS) + 1):
        spread = sites(n)
        assert len(spread) == n
        assert [client for clients in spread.values() for client in clients] == list(HOLDS)
    held = [{task for client in clients for task in HOLDS[client]} for clients in sites().values()]
    assert all(len(tasks) >= 2 for tasks in held)
    assert sum(tasks != set(STDLIB_LABELS) for tasks in held) >= 2
    with pytest.raises(DataError, match="7 sites asked for; the embedded data has 6 clients"):
        sites(7)


def test_a_source_filters_the_embedded_rows() -> None:
    source = Source(package="stdlib", where={"task": "area", "client": ["web", "mail"]})
    rows = read_rows(source, "test")
    assert rows == [row for row in stdlib_rows("area") if row["client"] in ("web", "mail") and row["split"] == "test"]
    with pytest.raises(DataError, match=r"no row matches .*'task': \['area', 'effect', 'error', 'kind'\]"):
        read_rows(Source(package="stdlib", where={"task": "areas"}))
    with pytest.raises(DataError, match=r"unknown task 'areas'; tasks are \['area', 'effect', 'error', 'kind'\]"):
        stdlib_rows("areas")


def test_every_module_has_one_home() -> None:
    names = [name for listed in MODULES.values() for name in listed.split()]
    assert len(set(names)) == len(names)
    assert {client for _, client in MODULES} == set(HOLDS)
    assert {area for area, _ in MODULES} == set(STDLIB_LABELS["area"])
    root = Path(sysconfig.get_paths()["stdlib"])
    there = [name for name in names if (root / name).is_dir() or (root / f"{name}.py").is_file()]
    assert len(there) > 0.9 * len(names)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return x > 1", "answers"),
        ("return not x and isinstance(x, int)", "answers"),
        ("if x: return True\nreturn False", "answers"),
        ("if x: return None\nreturn x + 1", "returns"),
        ("return True if x else 2", "returns"),
        ("self.x = 1", "acts"),
        ("for y in x:\n  print(y)\nreturn", "acts"),
        ("def inner(): return 1\ninner()", "acts"),
        ("yield x", None),
        ("y = yield x", None),
        ("pass", None),
        ("'doc'", None),
        ("raise NotImplementedError", None),
        ("assert x", None),
        ("match x:\n  case 1: return 2", "returns"),
        ("try: f()\nexcept OSError: return 2", "returns"),
    ],
)
def test_effect_is_read_from_the_body(body: str, expected: str | None) -> None:
    node = ast.parse("def f(x):\n" + textwrap.indent(body, "  ")).body[0]
    assert isinstance(node, ast.FunctionDef)
    assert effect(node) == expected


def test_texts_are_short_prose_without_the_name() -> None:
    assert sentences("One thing.\n  Two things. Three things.\n\n    >>> 1") == "One thing. Two things."
    assert sentences("Adds.\n\n    >>> add(1, 2)\n    3") == "Adds."
    assert len(sentences("word " * 99).split()) == 32
    assert len(sentences("hippopotamus " * 99)) <= 180
    assert masked("Popen: a Popen-like thing, not Popenx", "Popen") == "…: a …-like thing, not Popenx"


@pytest.mark.slow
@pytest.mark.parametrize("task", STDLIB_LABELS)
def test_each_task_is_learnable_and_sites_need_each_other(minilm: Base, task: str) -> None:
    """Frozen embeddings and a linear classifier: far above the majority, and no site alone is as good as all."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    rows = stdlib_rows(task)
    vectors = minilm.embed([row["text"] for row in rows])

    def f1(train: list[int]) -> float:
        model: Any = LogisticRegression(C=10, max_iter=500, class_weight="balanced")
        said = model.fit(vectors[train], [rows[place]["label"] for place in train]).predict(vectors[test])
        return float(f1_score(truth, said, average="macro", zero_division=0))

    train, test = ([place for place, row in enumerate(rows) if row["split"] == split] for split in ("train", "test"))
    truth = [rows[place]["label"] for place in test]
    pooled = f1(train)
    alone = [f1(mine) for clients in sites().values() if (mine := [place for place in train if rows[place]["client"] in clients])]
    most = Counter(rows[place]["label"] for place in train).most_common(1)[0][0]
    majority = f1_score(truth, [most] * len(test), average="macro", zero_division=0)
    assert pooled > max(majority, 1 / len(STDLIB_LABELS[task])) + 0.25
    assert pooled > np.mean(alone) + 0.05
