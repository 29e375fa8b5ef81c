"""A4: attaching many adapters to 28 linear layers, ours beside peft's ``add_adapter`` loop; the floor is the copy of their values."""

from __future__ import annotations

from time import process_time
from typing import Any

import torch
from tests.bench._mixed import adapters_of, bank_of, base_of, peft_of

COUNTS = (32, 128)
GOAL = "ratio >= 1000"


def run(repeats: int = 5) -> list[dict[str, object]]:
    """CPU seconds: the best of ``repeats`` for ours and the floor, one run for the peer, which takes most of a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base = base_of()
        return [_row(base, count, repeats) for count in COUNTS]
    finally:
        torch.set_num_threads(threads)


def _row(base: Any, count: int, repeats: int) -> dict[str, object]:
    adapters = adapters_of(base, count, 8)
    began = process_time()
    peft_of(base, adapters)
    peer = process_time() - began
    seconds = {"ours": [_attach(base, adapters) for _ in range(repeats)], "floor": [_copy(adapters) for _ in range(repeats)]}
    ours, floor = min(seconds["ours"]), min(seconds["floor"])
    case = f"adapter_attach {count} adapters, 28 layers 512 wide, r=8"
    shares = {"ratio": peer / ours, "floor_share": floor / ours, "limit": peer / floor}
    return {
        "row": "A4",
        "case": case,
        "ours": ours,
        "peer": peer,
        "floor": floor,
        **shares,
        "goal": GOAL if count == 128 else "",
        "unit": "CPU s",
    }


def _attach(base: Any, adapters: dict[str, Any]) -> float:
    began = process_time()
    with bank_of(base, adapters):
        return process_time() - began


def _copy(adapters: dict[str, Any]) -> float:
    began = process_time()
    size = next(iter(adapters.values())).tensors.layout.size
    room = torch.empty(len(adapters), size)
    for place, adapter in enumerate(adapters.values()):
        room[place].copy_(torch.from_numpy(adapter.tensors.flat))
    return process_time() - began


if __name__ == "__main__":
    for found in run(3):
        print({key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()})
