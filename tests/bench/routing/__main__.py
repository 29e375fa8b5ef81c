"""Specialists and their routers on real rows: ``python -m tests.bench.routing --data DIR --models DIR [--quick]`` (see README.md)."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tests.bench.routing.compare import Table, compare, to_the_base
from tests.bench.routing.world import ENCODERS, TASKS, Size, make_world


def main() -> None:
    """Entry point."""
    chosen = arguments()
    if not (chosen.data and chosen.models and (chosen.models / "stories260k").is_dir()):
        print("skipped: give the rows with --data (FEDPEFT_DATA) and the small models with --models (FEDPEFT_MODELS)")
        sys.exit(0)
    torch.set_num_threads(1)
    began = time.monotonic()
    size = Size(16, 0.1, chosen.keep) if chosen.quick else Size(keep=chosen.keep)
    world = make_world(chosen.data, chosen.models, size, chosen.encoder)
    table, own = compare(world)
    away = to_the_base(world, own)
    print("\n".join([*matrix(table), "", *summary(table), "", *abroad(away), "", f"{time.monotonic() - began:.0f} s in all"]))
    if chosen.json:
        chosen.json.write_text(json.dumps({"nats": table.means, "routed right": table.right, "to the base": away}, indent=1))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "models"):
        parser.add_argument(f"--{name}", type=Path, default=_folder(f"FEDPEFT_{name.upper()}"))
    parser.add_argument("--encoder", nargs="+", default=ENCODERS, metavar="MODEL", help="what embeds; `base` is the base itself")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where trained adapters and gates are kept, and read again")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps and 16 rows a task: that it runs, not what comes out")
    return parser.parse_args()


def _folder(variable: str) -> Path | None:
    return Path(os.environ[variable]) if variable in os.environ else None


def matrix(table: Table) -> list[str]:
    """Nats per token of every task (rows) under every adapter and way to route (columns)."""
    ways = list(table.means)
    head = "nats per token".ljust(13) + "".join(way[:10].rjust(11) for way in ways)
    lines = [name.ljust(13) + "".join(f"{table.means[way][name]:11.3f}" for way in ways) for name in TASKS]
    best = [min(TASKS, key=lambda way: table.means[way][name]) for name in TASKS]
    own = sum(name == found for name, found in zip(TASKS, best, strict=True))
    return [head, *lines, f"own adapter is the best of all on {own} of {len(TASKS)} tasks"]


def summary(table: Table) -> list[str]:
    """Of what the own adapter gains over the base, the share that each way recovers; and how often it chose the own adapter."""
    lines = ["way to route".ljust(26) + "recovered".rjust(10) + "worst task".rjust(11) + "own first".rjust(11)]
    for way in [way for way in table.means if way not in TASKS]:
        shares = [table.recovered(way, name) for name in TASKS]
        right = f"{table.right[way]:11.2f}" if way in table.right else "-".rjust(11)
        lines.append(f"{way:<26}{np.mean(shares):10.3f}{min(shares):11.3f}{right}")
    return lines


def abroad(away: dict[str, dict[str, float]]) -> list[str]:
    """The share of requests that goes to the base."""
    sets = list(next(iter(away.values())))
    head = "to the base".ljust(16) + "".join(name.rjust(15) for name in sets)
    return [head, *(router.ljust(16) + "".join(f"{shares[name]:15.3f}" for name in sets) for router, shares in away.items())]


if __name__ == "__main__":
    main()
