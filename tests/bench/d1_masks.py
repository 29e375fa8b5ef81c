"""D1, D4: one site quantises and masks its values, ours and flwr's SecAgg+ stage 2, in CPU time and bytes per value.

Both sides start from float32 values and the same number of neighbours, open the neighbours' boxes, agree on pairwise keys and end with
the vector that leaves. Ours also commits to the vector (one mask hides one vector). The floor is the bare AES keystream of as many streams,
by the faster of the machine's two ways to it; the rows "mask" hold the masking alone to within 1.5x of it.
"""

from __future__ import annotations

import os

import numpy as np
from tests.bench._common import least, row_of
from tests.bench._secagg import Cohort, coder, flwr_boxes, flwr_mask, flwr_sites, identities, values

from fedpeft.privacy.secagg import Instance, apply_masks, masks

CASES = ((1_000_000, 10, 14), (1_000_000, 100, 14), (10_000_000, 10, 40), (10_000_000, 100, 40))
"""Values, neighbours, goal."""
RAW_BLOCK = 1 << 17


def run(repeats: int = 3) -> list[dict[str, object]]:
    """Rows D1 (CPU seconds) and D4 (bytes per value)."""
    rows: list[dict[str, object]] = []
    for size, peers, goal in CASES:
        rounds = 1 if size * peers > 10**8 else repeats
        rows += _client(size, peers, goal, rounds)
        rows.append(_floor(size, peers, repeats))
    return rows


def _client(size: int, peers: int, goal: int, repeats: int) -> list[dict[str, object]]:
    delta, encode = values(size, 1)[0], coder(size, peers + 1)
    states, keys = flwr_sites(peers + 1, 2 * peers // 3)
    boxes = flwr_boxes(states, keys, 1)
    with identities(peers + 1) as known:
        # these shares make all pairs neighbours, so that both sides add as many masks
        cohort = Cohort(Instance("bench/d1", tuple(known), 0.3, 0.3), known)
        cohort.prepare()
    name = next(iter(known))
    if len(cohort.instance.graph[name]) != peers:
        raise AssertionError(f"{len(cohort.instance.graph[name])} neighbours, the case wants {peers}")
    member, told = cohort.members[name], (cohort.collector.boxes_for(name), cohort.collector.dealers)
    sent: dict[str, object] = {}

    def ours() -> None:
        sent["ours"] = member.mask(encode(delta), *told)

    def peer() -> None:
        sent["peer"] = flwr_mask(states[1], boxes, delta)

    seconds = least({"ours": ours, "peer": peer, "floor": lambda: _raw(size, peers + 1)}, repeats)
    case = f"{size / 1e6:.0f}M values, {peers} neighbours"
    row = row_of("D1", f"quantise and mask, {case}", seconds, "ours", f"ratio >= {goal}")
    mine, its = sent["ours"].nbytes / size, sum(map(len, sent["peer"])) / size  # type: ignore[attr-defined,arg-type]
    return [
        row,
        {"row": "D4", "case": f"uplink, {case}", "ours": mine, "peer": its, "ratio": its / mine, "goal": "ratio >= 2", "unit": "B/value"},
    ]


def _floor(size: int, peers: int, repeats: int) -> dict[str, object]:
    keys = [os.urandom(16) for _ in range(peers + 1)]
    codes = np.zeros(size, np.int32)
    seconds = least({"ours": lambda: apply_masks(codes, keys[::2], keys[1::2]), "floor": lambda: _raw(size, peers + 1)}, repeats)
    return {
        "row": "D1",
        "case": f"mask over bare keystream ({4 * size * (peers + 1) / seconds['floor'] / 1e9:.1f} GB/s), {size / 1e6:.0f}M x {peers}",
        "ours": seconds["ours"],
        "floor_share": seconds["floor"] / seconds["ours"],
        "goal": "overhead <= 1.5",
        "unit": "CPU s",
    }


def _raw(size: int, streams: int) -> None:
    """The keystreams alone."""
    zeros, buffer = bytes(RAW_BLOCK), bytearray(RAW_BLOCK)
    for _ in range(streams):
        stream = masks._fastest()(os.urandom(16))
        for start in range(0, 4 * size, RAW_BLOCK):
            stream.update_into(zeros[: min(RAW_BLOCK, 4 * size - start)], buffer)


if __name__ == "__main__":
    for row in run():
        print(row)
