"""D6: one masked sum of up to 1,000 sites through the real machines, a fifth of them vanishing, and how its cost grows.

Every machine runs in one process; each size in a process of its own. Sites vanish before each of the five steps in turn. The sum is
compared with the plain one. Printed: CPU seconds of all sites and of the coordinator, what was handed over, MiB of peak memory above import
(all machines together), and the exponent of n that fits each: n log n fits as 1.18 between 125 and 1,000, n^2 as 2. Names are the lists of
dealers and survivors that every site gets; they are the one part that grows as n^2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import log2
from pathlib import Path

import numpy as np
from tests.bench._secagg import Cohort, identities, leaving

from fedpeft.privacy.secagg import Instance, shape

SIZES = (125, 250, 500, 1000)
LARGER = (2000, 4000, 8000, 16000, 32000)
VALUES = 4096
SHARE = 5


def run(repeats: int = 1) -> list[dict[str, object]]:
    """Rows D6; one run each, whatever ``repeats`` says, as the largest takes minutes."""
    found = {sites: _child(sites) for sites in SIZES}
    rows = [_row(sites, seen) for sites, seen in found.items()]
    kinds = ("sites", "coordinator", "messages", "names", "memory")
    rows += [
        {"row": "D6", "case": f"{kind} grow as n^", "ours": _exponent({n: seen[kind] for n, seen in found.items()}), "unit": ""}
        for kind in kinds
    ]
    pairs = {sites: sites * shape(sites).degree for sites in (*SIZES, *LARGER)}
    for part in (SIZES, LARGER):
        case = f"pairs of neighbours from {part[0]} to {part[-1]} grow as n^ (n log n: {_exponent({n: n * log2(n) for n in part}):.2f})"
        rows.append({"row": "D6", "case": case, "ours": _exponent({n: pairs[n] for n in part}), "unit": ""})
    most = max(count / (sites * log2(sites)) for sites, count in pairs.items())
    return [*rows, {"row": "D6", "case": "pairs over n log2 n, largest from 125 to 32000 sites", "ours": most, "unit": ""}]


def _row(sites: int, seen: dict[str, float]) -> dict[str, object]:
    case = (
        f"{sites} sites of degree {shape(sites).degree}, {sites // SHARE} vanish: {seen['messages'] / 1e3:.0f}k items, "
        f"{seen['memory']:.0f} MiB, coordinator {seen['coordinator']:.2f} s"
    )
    return {
        "row": "D6",
        "case": case,
        "ours": seen["sites"] + seen["coordinator"],
        **{f"of {name}": value for name, value in seen.items()},
        "unit": "CPU s",
    }


def _exponent(seen: dict[int, float]) -> float:
    """Slope of the logarithms."""
    return float(np.polyfit(np.log(list(seen)), np.log(np.maximum(list(seen.values()), 1e-9)), 1)[0])


def _child(sites: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.d_thousand", str(sites)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return dict(json.loads(answer.stdout))


def _measure(sites: int) -> dict[str, float]:
    before = _status("VmRSS")
    with identities(sites) as known:
        names = list(known)
        cohort = Cohort(Instance("bench/d6", tuple(names)), known, leaving(names, SHARE))
        cohort.prepare()
        cohort.deliver(_codes)
        total = cohort.open()
    plain = np.zeros(VALUES, np.uint32)
    for name in cohort.collector.survivors:
        plain += _codes(name).view(np.uint32)
    if not np.array_equal(total.view(np.uint32), plain):
        raise AssertionError("the sum under masks is not the plain sum")
    memory = (_status("VmHWM") - before) / 1024
    messages = sum(count for kind, count in cohort.items.items() if kind != "names")
    return {**cohort.spent, "messages": messages, "names": cohort.items["names"], "memory": memory}


def _codes(name: str) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).integers(-(2**31), 2**31, VALUES, np.int64).astype(np.int32)


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(_measure(int(sys.argv[1]))))
    else:
        for row in run():
            print(row)
