"""M2, M3: tasks that nobody declared, and tasks that part by where they point; real text through real rounds.

    python -m tests.bench m_clusters       (FEDPEFT_SHARED set, or ../shared; about five CPU minutes; --repeats 15: three seeds)

M2: four sites hold rows of one task "intent" and nobody knows that two of them are of another kind: "kinds", a bank's customers and a
voice assistant under one set of labels; "labels", the same bank where two sites call every intent by another's name. Accuracy on
everybody's held-out rows of one adapter for all, of `clusters = 2` (IFCA), and, as its ceiling, of the two declared as tasks. The note
says which sites were together at the end. M3: the tasks of m_sharing under a shared A, parted by `cluster_after`; the peer is A shared
by all to the end.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
from tests.bench import m_sharing
from tests.bench._sites import TOKENS, Held, Row, bank, federate, labels, part, voice

from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft_coordinator.state import Round

SITES = ("a1", "a2", "b1", "b2")
ROUNDS, PART_AFTER = 6, 3
WAYS = ("one adapter", "clusters = 2", "declared")


def run(repeats: int) -> list[dict[str, object]]:
    """The table; every five of ``repeats`` are a seed more."""
    base, seeds = load_base(BaseSpec("minilm", max_tokens=TOKENS), "cpu"), range(max(1, repeats // 5))
    first = bank()
    settings = {"kinds": (first, voice()), "labels": (first, renamed(first))}
    rows = [row for name, kinds in settings.items() for row in _ifca(name, kinds, base, seeds)]
    return [*rows, *_parted(base, seeds)]


def _ifca(name: str, kinds: tuple[list[Row], list[Row]], base: Base, seeds: range) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    peer = 0.0
    for way in WAYS:
        found = [_one(kinds, way, base, seed) for seed in seeds]
        ours, told = fmean(accuracy for accuracy, _ in found), " / ".join(dict.fromkeys(together for _, together in found))
        peer = peer or ours
        case = f"{name}: {way}{f', {told}' if way == WAYS[1] else ''}"
        rows.append({"row": "M2", "case": case, "ours": ours, "peer": peer, "ratio": ours / peer, "unit": "accuracy; peer: one adapter"})
    return rows


def _one(kinds: tuple[list[Row], list[Row]], way: str, base: Base, seed: int) -> tuple[float, str]:
    """Accuracy over all sites' held-out rows, and which sites trained together in the last round."""
    form: dict[str, Any] = {"kind": "classification", "labels": labels([*kinds[0], *kinds[1]])}
    names = {"a": "first", "b": "second"} if way == "declared" else dict.fromkeys("ab", "intent")
    tasks = {task: {**form, **({"clusters": 2} if way == WAYS[1] else {})} for task in names.values()}
    rng = np.random.default_rng(seed)
    held: Held = {site: {names[site[0]]: part(kinds[site[0] == "b"], int(site[1]) - 1, 2, rng)} for site in SITES}
    last = federate({"seed": seed, "rounds": ROUNDS, "evaluate_every": ROUNDS, "tasks": tasks}, held, base)[-1]
    return _accuracy(last), together(last)


def _accuracy(last: Round) -> float:
    """Over all rows: sites hold as many each, so a task counts as its sites do."""
    rows = [row for row in last.tasks.values() if row.cohort and row.scores]
    return sum(row.scores["accuracy"] * len(row.cohort) for row in rows) / sum(len(row.cohort) for row in rows)


def together(last: Round) -> str:
    """Which sites trained together, as ``a1 a2 | b1``."""
    return " | ".join(sorted(" ".join(sorted(row.cohort)) for row in last.tasks.values() if row.cohort))


def renamed(rows: list[Row]) -> list[Row]:
    """``rows`` with every label by the next one's name."""
    names = labels(rows)
    return [{**row, "label": names[(names.index(row["label"]) + 1) % len(names)]} for row in rows]


def _parted(base: Base, seeds: range) -> list[dict[str, object]]:
    tasks = m_sharing.tasks_of()
    cases = {"A shared to the end": 0, f"parted after round {PART_AFTER}": PART_AFTER}
    rows: list[dict[str, object]] = []
    peer = 0.0
    for case, after in cases.items():
        found = [_groups(tasks, base, seed, after) for seed in seeds]
        ours, told = fmean(accuracy for accuracy, _ in found), " / ".join(dict.fromkeys(groups for _, groups in found))
        peer = peer or ours
        rows.append(
            {"row": "M3", "case": f"{case}: {told}", "ours": ours, "peer": peer, "ratio": ours / peer, "unit": "accuracy, mean of tasks"}
        )
    return rows


def _groups(tasks: dict[str, list[Row]], base: Base, seed: int, after: int) -> tuple[float, str]:
    """Mean accuracy of the tasks, and which of them shared at the end."""
    declared = {task: {"kind": "classification", "labels": labels(rows)} for task, rows in tasks.items()}
    table = {"seed": seed, "rounds": ROUNDS, "evaluate_every": ROUNDS, "tasks": declared, "sharing": {"share": "A", "cluster_after": after}}
    last = federate(table, m_sharing.held_by(tasks, seed), base)[-1]
    groups: dict[str, list[str]] = {}
    for task, row in last.tasks.items():
        groups.setdefault(row.moved_to or row.group, []).append(task)
    return fmean(row.scores["accuracy"] for row in last.tasks.values()), " | ".join(" ".join(found) for found in groups.values())
