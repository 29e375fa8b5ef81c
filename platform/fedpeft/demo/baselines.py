"""What the federation is compared with: the base alone, each site on its own, and all rows pooled in one place.

Run as a process of its own, ``python -m fedpeft.demo.baselines FOLDER ROUNDS local|pooled``, so that two run side by side.
Every comparison has the federation's base, method, seed and number of examples: a site alone trains as many steps as it
trains in all rounds, and the pooled run as many as all sites together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.demo.setting import MAX_TOKENS, QUANTIZATION, TASKS, Setting
from fedpeft.processes import hold

if TYPE_CHECKING:
    from fedpeft.bases import Base

Say = Callable[[str], None]


def base_alone(setting: Setting, base: Base) -> dict[str, float]:
    """Score of the untrained base per task: the label whose name is nearest to the text by embedding."""
    from fedpeft.tasks import read_rows

    found = {}
    for name in setting.tasks:
        rows = read_rows(setting.source(name), "test")
        labels = setting.task(name).head.labels
        nearest = (base.embed([row["text"] for row in rows]) @ base.embed(list(labels)).T).argmax(axis=1)
        found[name] = macro_f1([row["label"] for row in rows], [labels[place] for place in nearest])
    return found


def macro_f1(truth: Sequence[str], said: Sequence[str]) -> float:
    """Mean F1 over labels."""
    from sklearn.metrics import f1_score

    return float(f1_score(truth, said, average="macro", zero_division=0.0))


def local(setting: Setting, base: Base, say: Say) -> dict[str, dict[str, float]]:
    """Task -> site -> score on everybody's held-out rows of an adapter trained on that site's rows alone."""
    scores: dict[str, dict[str, float]] = {name: {} for name in TASKS}
    for name, site in setting.pairs():
        say(f"{site} alone: {name}")
        scores[name][site] = fit(setting, base, name, (site, setting.rounds))
    return scores


def pooled(setting: Setting, base: Base, say: Say) -> dict[str, float]:
    """Task -> score of an adapter trained on all rows together."""
    scores = {}
    for name in TASKS:
        say(f"pooled: {name}")
        scores[name] = fit(setting, base, name, (None, setting.rounds * len(setting.holders(name))))
    return scores


def fit(setting: Setting, base: Base, name: str, budget: tuple[str | None, int]) -> float:
    """Train one adapter from round 0's start on a site's rows (None: all) for so many rounds' steps; score it on all test rows."""
    from dataclasses import replace

    from fedpeft.adapters import attach, initial, make_spec
    from fedpeft.tasks import read_rows
    from fedpeft.training import TrainJob, evaluate, train

    site, rounds = budget
    task = setting.task(name)
    spec = make_spec(name, base, setting.method, task.head)
    data = task.encode(read_rows(setting.source(name, site), "train"), base)
    test = task.encode(read_rows(setting.source(name), "test"), base)
    settings = replace(setting.training, steps=setting.training.steps * rounds)
    with attach(base, spec) as live:
        live.load(initial(base, spec, setting.seed).tensors)
        train(live, task, data, settings, TrainJob(spec.layout.roles, setting.seed))
        return float(task.scores(evaluate(live, task, test))[task.headline])


def say(line: str) -> None:
    """Print one line of progress at once."""
    print(line, flush=True)


def main() -> None:
    """Entry point of the process."""
    import torch

    from fedpeft.bases import BaseSpec, load_base

    hold()
    folder, rounds, which = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    setting = Setting(folder, rounds)
    base = load_base(BaseSpec("minilm", QUANTIZATION, max_tokens=MAX_TOKENS))
    report: dict[str, Any] = {which: (local if which == "local" else pooled)(setting, base, say)}
    if which == "pooled":
        report["base"] = base_alone(setting, base)
    (folder / f"{which}.json").write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
