"""Repeat published orderings in small: ``python -m tests.bench.orderings [EXPERIMENT ...]`` (see README.md)."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

import torch
from tests.bench.orderings.cells import Store, write
from tests.bench.orderings.experiments import EXPERIMENTS, Experiment, Outcome, conduct, quick
from tests.bench.orderings.world import make_world

PACKAGES = ("torch", "transformers", "peft", "numpy")


def main() -> None:
    """Entry point."""
    chosen = arguments()
    if chosen.data is None or not chosen.data.exists():
        print(f"skipped: no rows at {chosen.data}; give banking77 as JSON lines with --data or FEDPEFT_DATA")
        sys.exit(0)
    torch.set_num_threads(1)
    world = make_world(chosen.data)
    store = Store(chosen.out / "quick" if chosen.quick else chosen.out, time.monotonic() + 60 * chosen.minutes)
    for name in chosen.experiments or EXPERIMENTS:
        experiment = shaped(EXPERIMENTS[name](), chosen)
        outcome = conduct(world, experiment, store)
        write(store.folder / f"{name}.json", report(name, experiment, outcome))
        print("\n".join(table(name, experiment, outcome)), flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="*", choices=[*EXPERIMENTS, []], help="all when left out")
    parser.add_argument("--data", type=data_file, default=data_file(os.environ.get("FEDPEFT_DATA")), help="banking77.jsonl or its folder")
    parser.add_argument("--out", type=Path, default=Path("orderings-run"), help="cells and reports; a finished cell is not run again")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no cell after so many")
    parser.add_argument("--seeds", type=int, help="so many of the experiment's seeds")
    parser.add_argument("--ranks", type=int, nargs="*", help="only these ranks")
    parser.add_argument("--without", nargs="*", default=[], help="leave these arms out")
    parser.add_argument("--quick", action="store_true", help="everything once, 1.5 CPU minutes; shows that it runs, no ordering")
    return parser.parse_args()


def data_file(path: str | None) -> Path | None:
    """The file itself, in a folder or not."""
    found = Path(path) if path else None
    return found / "banking77.jsonl" if found and found.is_dir() else found


def shaped(experiment: Experiment, chosen: argparse.Namespace) -> Experiment:
    """The experiment as the command line cuts it."""
    found = quick(experiment) if chosen.quick else experiment
    ranks = tuple(rank for rank in found.ranks if not chosen.ranks or rank in chosen.ranks)
    arms = {name: arm for name, arm in found.arms.items() if name not in chosen.without}
    return replace(found, arms=arms, ranks=ranks, seeds=found.seeds[: chosen.seeds])


def report(name: str, experiment: Experiment, outcome: Outcome) -> dict[str, object]:
    """What the JSON file holds."""
    versions = {package: version(package) for package in PACKAGES}
    return {"experiment": name, "setting": asdict(experiment.setting), "versions": versions} | asdict(outcome)


def table(name: str, experiment: Experiment, outcome: Outcome) -> list[str]:
    """Test accuracy in per cent, mean, deviation and per seed."""
    lines = [f"\n{name}: {experiment.setting}; test accuracy in %, per seed {list(experiment.seeds)}"]
    for rank in experiment.ranks:
        for arm, by_rank in outcome.accuracy.items():
            found = [100 * value for value in by_rank[rank].values() if value is not None]
            spread = f"{stdev(found):5.2f}" if len(found) > 1 else "    -"
            centre = f"{mean(found):6.2f}" if found else "     -"
            each = " ".join(f"{value:6.2f}" for value in found)
            lines.append(f"  rank {rank:<3} {arm:<34} lr {outcome.rates[arm]:<7g} mean {centre} sd {spread}   {each}")
    return lines


if __name__ == "__main__":
    main()
