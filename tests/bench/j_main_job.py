"""J: the main job as users run it: real processes, two rounds of the demo's federation; what it costs beyond training.

The peer for bytes is plain Flower FedAvg: the same adapters, one fp32 array per tensor in Flower's own serialisation, each way.
Wall seconds and resident memory, one run: read them as this machine's, not as ratios.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

ROUNDS = 2
PARTS = {
    "fedpeft coordinator up": "coordinator",
    "fedpeft_coordinator.link": "SuperLink",
    "fedpeft_client.executor": "site worker",
    "fedpeft_client.supernode": "site SuperNode",
    "fedpeft client join": "site supervisor",
}


def run(repeats: int = 5) -> list[dict[str, object]]:
    """One federation; ``repeats`` is ignored, since a run takes a minute."""
    from rich.console import Console
    from rich.progress import Progress

    from fedpeft.demo import driver
    from fedpeft.demo.setting import TASKS, Setting
    from fedpeft.parity.federating import events_of, per_round

    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder) / "run", ROUNDS)
        driver.prepare(setting, fresh=True)
        peaks: dict[str, float] = defaultdict(float)
        stop = threading.Event()
        watch = threading.Thread(target=_watch, args=(str(folder), peaks, stop))
        watch.start()
        try:
            driver.federate(setting, Progress(console=Console(quiet=True), disable=True))
        finally:
            stop.set()
            watch.join()
        rounds = per_round(events_of(setting.folder))
        plain = sum(_flower_bytes(setting.folder / "coordinator" / "registry", task) * len(setting.holders(task)) for task in TASKS)
    return [*_rounds(rounds, plain), *(_row(f"peak resident memory, {part}", peak, "MiB") for part, peak in sorted(peaks.items()))]


def _rounds(rounds: list[dict[str, float]], plain: int) -> list[dict[str, object]]:
    beyond = fmean(row["seconds"] - row["training"] for row in rounds)
    rows = [_row("seconds per round beyond the slowest site's training", beyond, "wall s")]
    for way in ("up", "down"):
        ours = fmean(row[way] for row in rounds)
        rows.append({**_row(f"bytes {way} per round, 3 sites, 3 tasks", ours, "B"), "peer": float(plain), "ratio": plain / ours})
    return rows


def _row(case: str, ours: float, unit: str) -> dict[str, object]:
    return {"row": "J", "case": case, "ours": ours, "unit": unit}


def _flower_bytes(registry: Path, task: str) -> int:
    """Bytes of a task's adapter as Flower sends a model: one fp32 .npy per tensor inside its records."""
    from flwr.app import ArrayRecord, RecordDict
    from flwr.common.serde import recorddict_to_proto

    from fedpeft.registry import Registry

    named = Registry(registry).load(task).tensors.named()
    return len(recorddict_to_proto(RecordDict({"arrays": ArrayRecord(list(named.values()))})).SerializeToString())


def _watch(folder: str, peaks: dict[str, float], stop: threading.Event) -> None:
    """Keep the highest VmHWM of each kind of process whose command line names ``folder``."""
    while not stop.wait(0.5):
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                part = next((name for words, name in PARTS.items() if words in command), None)
                if part is None or folder not in command:
                    continue
                lines = (process / "status").read_text().splitlines()
            except OSError:
                continue
            peak = next((float(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0.0) / 1024
            peaks[part] = max(peaks[part], peak)


if __name__ == "__main__":
    began = time.monotonic()
    for row in run():
        print(row)
    print(f"{time.monotonic() - began:.0f} s")
