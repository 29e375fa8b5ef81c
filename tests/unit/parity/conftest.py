"""A federation of two tasks over three sites, as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

FEDERATION = """
name = "toy"
seed = 5
rounds = 2
state = "state"
base = {{ model = "minilm", max_tokens = 16 }}
method = {{ kind = "lora", r = 4, targets = ["attention"] }}
training = {{ steps = 3, batch_size = 4, lr = 4e-3, lr_by_role = {{ head = 1e-2 }} }}
{more}
[cohort]
min_sites = 2
[tasks.kind]
kind = "classification"
labels = ["animal", "tool"]
[tasks.mood]
kind = "classification"
labels = ["bad", "good"]
{mood}
"""
HELD = {"north": ("kind", "mood"), "south": ("kind", "mood"), "west": ("kind",)}
LABELS = {"kind": ("animal", "tool"), "mood": ("bad", "good")}


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Path]:
    """Write the files; answers the federation's path."""

    def write(more: str = "", mood: str = "", site: str = "", base: str = 'model = "minilm"\nmax_tokens = 16') -> Path:
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        (folder / "federation.toml").write_text(FEDERATION.format(more=more, mood=mood))
        for name, tasks in HELD.items():
            lines = [f'name = "{name}"', 'coordinator = "example.org:443"', "threads = 1", site, "[base]", base]
            for task in tasks:
                rows = [
                    {"text": f"{name} {LABELS[task][n % 2]} {n}", "label": LABELS[task][n % 2], "split": "test" if n > 5 else "train"}
                    for n in range(8)
                ]
                (folder / f"{name}-{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
                lines += [f"[data.{task}]", f'path = "{name}-{task}.jsonl"']
            (folder / f"{name}.toml").write_text("\n".join(lines) + "\n")
        return folder / "federation.toml"

    return write
