"""C1, D4 on the demo's federation: bytes up and macro F1 after six rounds of masked sums, in narrow codes and in 32 bits.

Real workers in one process over the in-memory transport, the two of the demo's tasks that three sites hold, alternating LoRA. Peer: plain
FedAvg through Flower, the whole adapter as fp32 records in every round. Bytes are those of all training answers, vectors under masks
with weight and counters included. One run each.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from tests.bench.j_main_job import _flower_bytes

CODECS = ("none", "int8", "int4")
TASKS = ("area", "error")


def run(repeats: int = 1) -> list[dict[str, object]]:
    """Two rows a codec; ``repeats`` is ignored, since a run takes a minute."""
    found = {codec: _federate(codec) for codec in CODECS}
    rows: list[dict[str, object]] = []
    for codec, (up, plain, score) in found.items():
        case = f"masked sums, {codec}, alternating, {len(TASKS)} tasks, 3 sites, 6 rounds"
        rows.append(
            {"row": "C1", "case": f"bytes up: {case}", "ours": up, "peer": plain, "ratio": plain / up, "goal": "ratio >= 8", "unit": "B"}
        )
        whole = found["none"][2]
        rows.append({"row": "C1", "case": f"macro F1: {case}", "ours": score, "peer": whole, "ratio": score / whole, "unit": "F1"})
    return rows


def _federate(codec: str) -> tuple[float, float, float]:
    """Bytes up of all rounds, those of plain fp32 FedAvg, mean macro F1."""
    import tomli_w

    from fedpeft.demo.setting import Setting

    with tempfile.TemporaryDirectory() as name:
        setting = Setting(Path(name) / "run")
        paths = setting.write(1)
        table: dict[str, Any] = setting._federation(1)
        table |= {"cohort": {**table["cohort"], "min_sites": 3}, "wire": {"codec": codec}}
        table["tasks"] = {task: table["tasks"][task] for task in TASKS}
        paths[0].write_bytes(tomli_w.dumps(table).encode())
        return _rounds(paths)


def _rounds(paths: list[Path]) -> tuple[float, float, float]:
    from fedpeft_client.config import load_site
    from fedpeft_client.worker import Worker
    from fedpeft_coordinator.build import build
    from fedpeft_coordinator.config import load_federation
    from fedpeft_coordinator.events import Events
    from fedpeft_coordinator.journal import Journal
    from fedpeft_coordinator.rounds import Coordinator
    from fedpeft_coordinator.store import Store
    from fedpeft_coordinator.transport_memory import MemoryTransport
    from fedpeft_coordinator.up import hello

    config, events = load_federation(paths[0]), []
    setup, publisher = build(config)
    workers = {path.stem: Worker(load_site(path, {"base.quantization": "none"})) for path in paths[1:]}
    base = next(iter(workers.values())).base
    for worker in workers.values():
        worker.__dict__["base"] = base
    transport = MemoryTransport({name: worker.handle for name, worker in workers.items()}, hello(setup))
    told = Events(None, [events.append])
    rounds = Coordinator(setup, Journal(config.database_url), Store(config.state / "blobs"), transport, told, publisher).run()
    up = sum(row["bytes_up"] for row in events if row["event"] == "answer" and row["kind"] == "train")
    plain = len(rounds) * len(workers) * sum(_flower_bytes(config.registry_folder, task) for task in TASKS)
    return float(up), float(plain), fmean(rounds[-1].tasks[task].scores["macro_f1"] for task in TASKS)


if __name__ == "__main__":
    for row in run():
        print(row)
