"""Codecs through real rounds: fewer bytes up, the same sum in any order, crashes, lies, and settings that cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.unit.coordinator.crashes import crash_everywhere

from fedpeft import config
from fedpeft.errors import ConfigError
from fedpeft.tensors import Entry, Layout
from fedpeft.wire import Envelope, flat
from fedpeft.wire.codecs import CODECS, Int4, as_delta
from fedpeft.wire.v1.federation_pb2 import RoundPlan
from fedpeft_coordinator.config import FederationConfig
from fedpeft_coordinator.fitting import check_fit
from fedpeft_coordinator.planning import codec_of
from fedpeft_coordinator.setup import Limits
from fedpeft_coordinator.transport import Failure

LAYOUT = Layout.of([Entry("A", "x.lora_A", (8, 40)), Entry("B", "x.lora_B", (60, 8)), Entry("head", "classifier.weight", (3, 40))])
HOLDINGS = {"north": {"area": 40}, "south": {"area": 25}, "west": {"area": 7}}
KINDS = sorted(set(CODECS) - {"none"})


def federation(fake: ModuleType, folder: Path, codec: str, rounds: int = 4, **extra: Any) -> Any:
    built = config.build(CODECS, codec, "codec")
    made = fake.setup(rounds=rounds, scheme="alternating", server="sgd", tasks=("area",), layout=LAYOUT, reach=16.0, codec=built, **extra)
    return fake.Federation(folder, replace(made, evaluate_every=0), fake.sites(HOLDINGS, LAYOUT))


def moved(fake: ModuleType, ours: Any) -> np.ndarray:
    """Run to the end: how far the adapter is then from its start."""
    coordinator = ours.open()
    rounds = coordinator.run()
    assert {row.tasks["area"].outcome for row in rounds} == {"updated"}, rounds[-1].tasks["area"].reason
    return coordinator.tensors("area", rounds[-1].tasks["area"].after).flat - fake.start("area", LAYOUT).flat


def cosine(one: np.ndarray, two: np.ndarray) -> float:
    return float(one @ two / np.linalg.norm(one) / np.linalg.norm(two))


@pytest.fixture(scope="module")
def plain(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Federations in 32 bits by their rounds, and where they ended."""
    found = {}
    for rounds in (4, 6):
        ours = federation(fake, tmp_path_factory.mktemp("plain"), "none", rounds)
        found[rounds] = ours, moved(fake, ours)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_codec_moves_the_adapter_as_32_bits_do(fake: ModuleType, plain: dict[int, Any], tmp_path: Path, kind: str) -> None:
    end = moved(fake, federation(fake, tmp_path, kind))
    assert cosine(plain[4][1], end) > {"topk": 0.15, "onebit": 0.6, "int2": 0.4}.get(kind, 0.97)


def test_the_order_of_arrival_is_irrelevant(fake: ModuleType, tmp_path: Path) -> None:
    ends = set()
    for place, late in enumerate(HOLDINGS):
        ours = federation(fake, tmp_path / str(place), "int4", rounds=1)
        ours.sites[late] = fake.slow(ours.sites[late], 0.1)
        ours.open().run()
        ends.add(ours.final()["area"])
    assert len(ends) == 1


def test_crashes_before_and_after_every_commit_give_the_same_bits(fake: ModuleType, tmp_path: Path) -> None:
    whole, ours = (federation(fake, tmp_path / name, "int4", rounds=2) for name in ("whole", "ours"))
    whole.open().run()
    assert crash_everywhere(ours) >= 2 * 9
    assert ours.final() == whole.final()


def test_a_message_that_is_none_is_a_named_drop_out(fake: ModuleType, tmp_path: Path) -> None:
    def garbage(result: Any, arrays: dict[str, bytes]) -> None:
        arrays["area"] = flat.pack(result.layout_fingerprint, np.frombuffer(b"\1\2\3", np.uint8))

    def codes(result: Any, arrays: dict[str, bytes]) -> None:
        arrays["area"] = flat.pack(result.layout_fingerprint, np.zeros(LAYOUT.subset({"B", "head"}).size, np.int32))

    for twist, words in ((garbage, "cut short"), (codes, "uint8 codes were expected")):
        ours = federation(fake, tmp_path / words[:3], "int4", rounds=1)
        ours.sites["west"] = replace(ours.sites["west"], twist=twist)
        (row,) = ours.open().run()
        assert words in row.tasks["area"].drops["west"]
        assert row.tasks["area"].outcome == "updated"


def test_plans_name_the_codec_to_train_with(fake: ModuleType, tmp_path: Path) -> None:
    ours = federation(fake, tmp_path, "int4", rounds=1)
    ours.setup = replace(ours.setup, evaluate_every=1)
    ours.open().run()
    asked = [(envelope.kind, task.codec_json) for envelope in ours.sites["north"].asked for task in envelope.open(RoundPlan).tasks]
    assert ("train", '{"kind": "int4", "block": 256}') in asked
    assert ("evaluate", "") in asked


def test_a_budget_picks_by_what_travels() -> None:
    assert codec_of(1000, 3, Limits()) is None
    assert codec_of(1000, 3, Limits(codec=Int4())) == Int4()
    assert codec_of(1000, 3, Limits(budget=4000)) is None
    assert codec_of(1000, 3, Limits(budget=2000)).kind == "bf16"
    assert codec_of(1_000_000, 3, Limits(budget=600_000)).kind == "int4"


def down(fake: ModuleType, folder: Path, codec: Any, rounds: int = 6, **extra: Any) -> Any:
    ours = federation(fake, folder, "none", rounds, **extra)
    return replace_limits(ours, down=as_delta(config.build(CODECS, codec, "codec")))


def replace_limits(ours: Any, **changes: Any) -> Any:
    ours.setup = replace(ours.setup, limits=replace(ours.setup.limits, **changes))
    return ours


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"ring"}))
def test_a_step_goes_down_in_a_codec_and_all_hold_the_same_bits(fake: ModuleType, plain: dict[int, Any], tmp_path: Path, kind: str) -> None:
    ours = down(fake, tmp_path, {"kind": "topk", "fraction": 0.1} if kind == "topk" else kind)
    wide, wanted = plain[6]
    assert cosine(wanted, moved(fake, ours)) > {"topk": 0.15, "onebit": 0.6, "int2": 0.5}.get(kind, 0.97)
    sizes = []
    for one in (ours, wide):
        trains = [envelope for envelope in one.sites["north"].asked if envelope.kind == "train"][1:]  # the first sends it whole
        assert {bool(envelope.open(RoundPlan).tasks[0].down_codec_json) for envelope in trains} == {one is ours}
        sizes.append(sum(len(array) for envelope in trains for array in envelope.arrays.values()))
    assert sizes[0] < 0.75 * sizes[1]  # the fake site checks every digest


def test_steps_down_give_the_same_bits_though_coordinators_crash_before_and_after_every_commit(fake: ModuleType, tmp_path: Path) -> None:
    whole, ours = (down(fake, tmp_path / name, "onebit", 3) for name in ("whole", "ours"))
    whole.open().run()
    assert crash_everywhere(ours) >= 2 * 14
    assert ours.final() == whole.final()


def test_a_site_that_lost_its_copy_or_missed_a_round_is_sent_values(fake: ModuleType, tmp_path: Path) -> None:
    ours = down(fake, tmp_path, "onebit", 3)

    def fault(site: str, request: Envelope) -> Failure | None:
        late = request.kind == "train" and request.open(RoundPlan).round == 2
        if late and site == "north":
            ours.sites["north"].kept.clear()
        return Failure("is busy") if late and site == "west" else None

    rows = [past.tasks["area"] for past in ours.open(fault=fault).run()]
    assert [list(row.drops) for row in rows] == [[], ["west"], []]
    told = {}
    for name, site in ours.sites.items():
        trains = [envelope.open(RoundPlan) for envelope in site.asked if envelope.kind == "train"]
        told[name] = [(plan.round, plan.tasks[0].down_codec_json != "", plan.tasks[0].previous_digest != "") for plan in trains]
    assert told["south"] == [(1, False, False), (2, True, True), (3, True, True)]
    assert told["north"] == [(1, False, False), (2, True, True), (2, False, False), (3, True, True)]
    assert told["west"] == [(1, False, False), (3, False, False)]


def settings(masks: bool = False, clip: float = 1.0, also: dict[str, Any] | None = None, **wire: Any) -> FederationConfig:
    tasks = {name: {"kind": "classification", "labels": ["a", "b"]} for name in ("area", "kind")}
    training, cohort = {"optimizer": "sgd", "clip": clip}, {"min_sites": 3 if masks else 1}
    table = {"name": "f", "tasks": tasks, "cohort": cohort, "wire": wire, "training": training, **(also or {})}
    return config.parse(table, FederationConfig, "federation.toml")


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        ({"codec": "int5"}, "unknown kind 'int5'"),
        ({"down": "ring"}, "wire.down"),
        ({"down": "int4", "also": {"scheme": "fedsvd"}}, r"wire\.down = 'int4' and scheme\.kind = 'fedsvd': .*leave wire\.down out"),
        ({"down": "int4", "also": {"sharing": {"share": "A"}}}, r"wire\.down = 'int4' and \[sharing\]: .*leave one of them out"),
        ({"codec": {"kind": "int4", "block": 2}}, "int4.block"),
        ({"codec": "int4", "budget": 1000}, "set one of them"),
        ({"budget": 0}, "wire.budget"),
        ({"codec": "bf16", "masks": True}, "have no sum under masks; take ring, int8, int4"),
        ({"codec": "topk", "masks": True}, "have no sum under masks"),
        ({"codec": "ring", "clip": 0.0}, "nothing says how far"),
        ({"codec": "int4", "masks": True, "clip": 0.0}, "nothing says how far"),
    ],
)
def test_settings_that_cannot_be_are_refused(wire: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**wire)


def test_a_budget_that_no_codec_fits_is_refused_before_anything_starts() -> None:
    check_fit(settings(budget=10_000), LAYOUT)
    with pytest.raises(ConfigError, match=r"wire\.budget: 9 bytes"):
        check_fit(settings(budget=9), LAYOUT)
    check_fit(settings(masks=True, budget=900), LAYOUT)
    with pytest.raises(ConfigError, match=r"wire\.budget: 300 bytes"):
        check_fit(settings(masks=True, budget=300), LAYOUT)
    assert settings(codec={"kind": "int4", "block": 64}).wire.codec == Int4(64)
    assert settings().wire.codec.kind == "none"
