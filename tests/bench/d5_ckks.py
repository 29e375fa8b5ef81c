"""D5: a site's cost of hiding its values from the coordinator, by masks among n sites and by CKKS (TenSEAL), CPU seconds and bytes.

Peer: TenSEAL's CKKS with polynomials of 8192 and primes of 60, 40, 40 bits, 4096 values a ciphertext, encryption and serialisation. It
needs one holder of the key, which masks do not. TenSEAL is no dependency; without it the row says so (pip install tenseal).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from tests.bench._common import least
from tests.bench._secagg import Cohort, coder, identities, values

from fedpeft.privacy.secagg import Instance

SIZE = 1_000_000
CASES = ((11, 100.0), (101, 15.0))
"""Sites, goal of the time; all pairs are neighbours."""
BYTES_GOAL = 14
DEGREE, PRIMES, SCALE = 8192, [60, 40, 40], 2.0**40


def run(repeats: int = 2) -> list[dict[str, object]]:
    """Rows D5."""
    if find_spec("tenseal") is None:
        return [{"row": "D5", "case": "skipped: TenSEAL is not installed (pip install tenseal)", "unit": ""}]
    return [row for sites, goal in CASES for row in _case(sites, goal, repeats)]


def _case(sites: int, goal: float, repeats: int) -> list[dict[str, object]]:
    import tenseal

    delta, encode = values(SIZE, 1)[0], coder(SIZE, sites)
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=PRIMES, n_threads=1)
    context.global_scale = SCALE
    with identities(sites) as known:
        cohort = Cohort(Instance("bench/d5", tuple(known), 0.3, 0.3), known)
        cohort.prepare()
    name = next(iter(known))
    member, told = cohort.members[name], (cohort.collector.boxes_for(name), cohort.collector.dealers)
    sent: dict[str, int] = {}

    def ours() -> None:
        sent["ours"] = member.mask(encode(delta), *told).nbytes

    def peer() -> None:
        sent["peer"] = sum(len(_encrypted(tenseal, context, delta[start : start + DEGREE // 2])) for start in range(0, SIZE, DEGREE // 2))

    seconds = least({"ours": ours, "peer": peer}, repeats)
    case, ratio = f"1M values, {sites - 1} neighbours, CKKS {DEGREE}/{PRIMES}", seconds["peer"] / seconds["ours"]
    size = {side: count / SIZE for side, count in sent.items()}
    return [
        {"row": "D5", "case": f"hide {case}", **seconds, "ratio": ratio, "goal": f"ratio >= {goal:g}", "unit": "CPU s"},
        {"row": "D5", "case": case, **size, "ratio": size["peer"] / size["ours"], "goal": f"ratio >= {BYTES_GOAL}", "unit": "B/value"},
    ]


def _encrypted(tenseal: Any, context: Any, values: Any) -> bytes:
    return bytes(tenseal.ckks_vector(context, values.tolist()).serialize())


if __name__ == "__main__":
    for row in run():
        print(row)
