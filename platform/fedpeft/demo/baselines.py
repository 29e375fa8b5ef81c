"""What the demo's federation is compared with: the base alone, each site on its own, and all rows pooled in one place.

Run as a process of its own, ``python -m fedpeft.demo.baselines FOLDER local|pooled``, so that two run side by side. How adapters are
trained without rounds is `fedpeft.parity.fitting`; here is what the demo adds: its base needs no training to name a label.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.parity import fitting
from fedpeft.parity.plan import Plan
from fedpeft.processes import hold

if TYPE_CHECKING:
    from fedpeft.bases import Base


def base_alone(plan: Plan, base: Base) -> dict[str, float]:
    """Score of the untrained base per task: the label whose name is nearest to the text by embedding."""
    found = {}
    for name, task in plan.tasks.items():
        rows, labels = plan.rows(name, "test"), task.head.labels
        nearest = (base.embed([str(row["text"]) for row in rows]) @ base.embed(list(labels)).T).argmax(axis=1)
        found[name] = macro_f1([str(row["label"]) for row in rows], [labels[place] for place in nearest])
    return found


def macro_f1(truth: Sequence[str], said: Sequence[str]) -> float:
    """Mean F1 over labels."""
    from sklearn.metrics import f1_score

    return float(f1_score(truth, said, average="macro", zero_division=0.0))


def say(line: str) -> None:
    """Print one line of progress at once."""
    print(line, flush=True)


def main() -> None:
    """Entry point of the process."""
    import torch

    from fedpeft.bases import load_base

    hold()
    folder, which = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    plan = Plan.of(folder)
    base = load_base(plan.base)
    report: dict[str, Any] = {which: (fitting.local if which == "local" else fitting.pooled)(plan, base, folder / "alone", say)}
    if which == "pooled":
        report["base"] = base_alone(plan, base)
    (folder / f"{which}.json").write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
