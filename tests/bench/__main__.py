"""`make bench`: every benchmark beside its named peer, in one table; figures as measured, goals held or not.

    python -m tests.bench [MODULE ...] [--repeats N] [--json FILE]

One compute thread, peer and ours interleaved in one process, the minimum of CPU time over the repeats; each module runs in a
process of its own. Read ratios, not seconds: the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
MODULES = sorted(path.stem for path in HERE.glob("[a-z]*.py"))
PACKAGES = ("torch", "transformers", "peft", "flwr", "numpy")
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
CALL = "import json,sys,importlib; print('ROWS'+json.dumps(importlib.import_module('tests.bench.'+sys.argv[1]).run(int(sys.argv[2]))))"


def rows_of(module: str, repeats: int) -> list[dict[str, object]]:
    """Run one module; a failure is a row of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CALL, module, str(repeats)], capture_output=True, text=True, cwd=HERE.parents[1], env=os.environ | QUIET
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("ROWS")]
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [{"row": "-", "case": f"{module} failed: {last}", "unit": ""}]
    return list(json.loads(found[-1][4:]))


def held(row: dict[str, object]) -> str:
    """Whether the goal is held: ``ratio >= N`` (peer over ours) or ``overhead <= N`` (ours over the floor)."""
    found = re.match(r"(ratio|overhead) (>=|<=) ([0-9.]+)", str(row.get("goal", "")))
    share = row.get("floor_share")
    seen = row.get("ratio") if found and found[1] == "ratio" else (1.0 / share if isinstance(share, int | float) and share else None)
    if not found or not isinstance(seen, int | float):
        return ""
    return "yes" if (seen >= float(found[3]) if found[2] == ">=" else seen <= float(found[3])) else "NO"


def figure(value: object) -> str:
    """A number with four digits that matter, anything else as text."""
    return f"{value:.4g}" if isinstance(value, int | float) else str(value if value is not None else "")


def line(row: dict[str, object]) -> str:
    """One row of the table."""
    ours, peer, ratio, share = (figure(row.get(key)) for key in ("ours", "peer", "ratio", "floor_share"))
    goal = str(row.get("goal", "")).split(",")[0]
    return f"{row['row']!s:<5}{row['case']!s:<66}{ours:>11}{peer:>11}{ratio:>9}{goal:>18} {held(row):<5}{share:>8}  {row.get('unit', '')}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"some of {', '.join(MODULES)}; all when left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, {versions}\n")
    every: list[dict[str, object]] = []
    print(f"{'row':<5}{'case':<66}{'ours':>11}{'peer':>11}{'ratio':>9}{'goal':>18} {'held':<5}{'floor':>8}  unit")
    for module in arguments.modules or MODULES:
        for row in rows_of(module, arguments.repeats):
            every.append(row)
            print(line(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(every, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
