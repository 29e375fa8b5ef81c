"""M1: what sharing a factor over tasks does to each of them, on real text: four tasks, four sites, few rows, through real rounds.

    python -m tests.bench m_sharing        (FEDPEFT_SHARED set, or ../shared; about five CPU minutes; --repeats 15: three seeds)

Accuracy on held-out rows after the last round, with every task alone ([sharing] absent), and with A, B or both shared; "gain" is the
mean over the shared steps of what the coordinator's report says (loss of the task's own step less loss of the common one). Four fifths of
the time are the base's own matrix products, so nothing but smaller sizes makes it shorter: texts of 24 tokens, batches of 8.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
from tests.bench._sites import TOKENS, Row, bank, federate, labels, part, read, some, voice

from fedpeft.bases import Base, BaseSpec, load_base

SITES = ("a", "b", "c", "d")
ROUNDS, EVALUATE = 9, 3
"""Rounds that are scored are of either phase: what sharing a factor gains is only told of a round that moves it."""
CASES: dict[str, dict[str, Any]] = {
    "each task alone": {},
    "A shared": {"sharing": {"share": "A", "report": True}},
    "B shared": {"sharing": {"share": "B", "report": True}},
    "both shared": {"sharing": {"share": "both", "report": True}},
}
Found = tuple[dict[str, float], dict[str, list[float]]]


def run(repeats: int) -> list[dict[str, object]]:
    """The table; every five of ``repeats`` are a seed more, accuracies averaged over them."""
    tasks, base = tasks_of(), load_base(BaseSpec("minilm", max_tokens=TOKENS), "cpu")
    rows: list[dict[str, object]] = []
    alone: dict[str, float] = {}
    for case, settings in CASES.items():
        found = [scored(tasks, base, settings, seed) for seed in range(max(1, repeats // 5))]
        accuracy = {task: fmean(scores[task] for scores, _ in found) for task in tasks}
        gains = {task: [value for _, gain in found for value in gain[task]] for task in tasks}
        alone = alone or accuracy
        for task in tasks:
            rows.append(_row(f"{task}, {case}", accuracy[task], alone[task], gains[task]))
        rows.append(_row(f"mean of tasks, {case}", fmean(accuracy.values()), fmean(alone.values()), []))
    return rows


def _row(case: str, ours: float, peer: float, gains: list[float]) -> dict[str, object]:
    told = f", report's gain {fmean(gains):+.4f} nats" if gains else ""
    return {"row": "M1", "case": case + told, "ours": ours, "peer": peer, "ratio": ours / peer, "unit": "accuracy; peer: alone"}


def scored(tasks: dict[str, list[Row]], base: Base, settings: dict[str, Any], seed: int) -> Found:
    """Accuracy of each task after the last round, and the gains that the report gives."""
    declared = {task: {"kind": "classification", "labels": labels(rows)} for task, rows in tasks.items()}
    table = {"seed": seed, "rounds": ROUNDS, "evaluate_every": EVALUATE, "tasks": declared, **settings}
    rounds = federate({**table, "cohort": {"min_sites": 2, "wait_for_sites": len(SITES)}}, held_by(tasks, seed), base)
    gains = {task: [float(past.tasks[task].gain["gain"]) for past in rounds if past.tasks[task].gain] for task in tasks}
    return {task: rounds[-1].tasks[task].scores["accuracy"] for task in tasks}, gains


def held_by(tasks: dict[str, list[Row]], seed: int) -> dict[str, dict[str, list[Row]]]:
    """Sites with rows of three tasks each, so that no two hold the same; the held-out rows lie at those that train the task."""
    rng, names = np.random.default_rng(seed), list(tasks)
    return {
        site: {task: part(tasks[task], place, len(SITES), rng) for task in names[:place] + names[place + 1 :]}
        for place, site in enumerate(SITES)
    }


def tasks_of() -> dict[str, list[Row]]:
    """Intents of a bank, of a voice assistant and of a broad one, and spam: balanced where labels are many."""
    return {
        "bank": bank(),
        "voice": voice(),
        "domain": some(read("clinc150", lambda row: row["client"])),
        "spam": some(read("sms_spam", lambda row: row["label"])),
    }
