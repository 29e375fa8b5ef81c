"""Schemes and combine rules of every kind through real rounds: crashes, lies, what travels, what stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.unit.coordinator.crashes import crash_everywhere

from fedpeft import config
from fedpeft.errors import CohortError, UpdateError
from fedpeft.schemes import SCHEMES, Gathers, Masks
from fedpeft.schemes.robust import COMBINES
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import Update
from fedpeft.wire import flat
from fedpeft.wire.v1.federation_pb2 import RoundPlan
from fedpeft_coordinator.averaging import joined

HEAD = Entry("head", "classifier.weight", (3, 4))
PAIR = (Entry("A", "x.lora_A", (4, 7)), Entry("B", "x.lora_B", (6, 4)))
LAYOUTS = [
    Layout.of([*PAIR, HEAD]),
    Layout.of([*PAIR, Entry("A2", "x.lora_A2", (5, 7)), Entry("B2", "x.lora_B2", (6, 5)), HEAD]),
    Layout.of([*PAIR, Entry("R", "x.lora_R", (4, 4)), HEAD]),
    Layout.of([Entry("theta", "x.road_theta", (6,)), Entry("alpha", "x.road_alpha", (6,)), HEAD]),
]
MANY = {f"s{number}": {"area": 20 + number} for number in range(7)}


def fits(kind: str, layout: Layout) -> bool:
    try:
        SCHEMES[kind]().check(layout)
    except UpdateError:
        return False
    return True


def federation(fake: ModuleType, folder: Path, scheme: Any, rounds: int = 3, **extra: Any) -> Any:
    kind = scheme if isinstance(scheme, str) else scheme["kind"]
    layout = next(layout for layout in LAYOUTS if fits(kind, layout))
    holdings = extra.pop("holdings", {"north": {"area": 40}, "south": {"area": 25}})
    made = fake.setup(rounds=rounds, scheme=scheme, tasks=("area",), layout=layout, **{"server": "sgd", "reach": 16.0, **extra})
    return fake.Federation(folder, replace(made, evaluate_every=0), fake.sites(holdings, layout))


@pytest.mark.parametrize("kind", sorted(SCHEMES))
def test_every_scheme_runs_and_moves_what_it_says(fake: ModuleType, tmp_path: Path, kind: str) -> None:
    ours = federation(fake, tmp_path, kind)
    coordinator = ours.open()
    rounds = coordinator.run()
    assert [row.tasks["area"].outcome for row in rounds] == ["updated"] * 3, rounds[-1].tasks["area"].reason
    row = rounds[-1].tasks["area"]
    before, after = (coordinator.tensors("area", digest) for digest in (row.before, row.after))
    assert after.finite
    still = before.layout.roles - row.moves
    assert np.array_equal(before.pick(still).flat, after.pick(still).flat)
    assert ours.final()["area"] != fake.start("area", ours.setup.tasks["area"].layout).digest


@pytest.mark.parametrize("kind", ["scaffold", "feddpa", "flexlora"])
def test_crashes_before_and_after_every_commit_give_the_same_bits(fake: ModuleType, tmp_path: Path, kind: str) -> None:
    whole, ours = (federation(fake, tmp_path / name, kind, rounds=2) for name in ("whole", "ours"))
    whole.open().run()
    assert crash_everywhere(ours) >= 2 * 10
    assert ours.final() == whole.final()
    kept = [{name: {key: own.digest for key, own in site.own.items()} for name, site in one.sites.items()} for one in (ours, whole)]
    assert kept[0] == kept[1]


def test_order_of_arrival_is_irrelevant_where_parts_are_kept(fake: ModuleType, tmp_path: Path) -> None:
    finals = []
    for name, order in (("up", sorted), ("down", lambda names: sorted(names, reverse=True))):
        ours = federation(fake, tmp_path / name, "flexlora", rounds=2, holdings=MANY)
        ours.open(order=order).run()
        finals.append(ours.final())
    assert finals[0] == finals[1]


def test_a_task_that_misses_a_round_keeps_its_own_count(fake: ModuleType, tmp_path: Path) -> None:
    ours = fake.Federation(tmp_path, fake.setup(rounds=4, tasks=("area", "kind")), fake.sites())
    coordinator = ours.open()
    numbers: list[int] = []
    for site in ours.sites.values():
        site.twist = lambda result, _arrays: _fail(result) if result.task == "kind" and len(coordinator.history) == 3 else None
    rounds = coordinator.run()
    numbers = [row.tasks["kind"].number for row in rounds]
    assert numbers == [1, 2, 3, 3]
    assert [row.tasks["kind"].phase for row in rounds] == ["B", "A", "B", "B"]
    assert [row.tasks["area"].phase for row in rounds] == ["B", "A", "B", "A"]


def _fail(result: Any) -> None:
    result.status, result.reason = type(result).STATUS_FAILED, "out of memory"


@pytest.mark.parametrize("kind", ["feddpa", "fedsa"])
def test_private_tensors_stay_apart_and_differ(fake: ModuleType, tmp_path: Path, kind: str) -> None:
    ours = federation(fake, tmp_path, kind)
    coordinator = ours.open()
    row = coordinator.run()[-1].tasks["area"]
    assert row.private
    north, south = (ours.sites[name].own["area", 3] for name in ("north", "south"))
    assert {name.removeprefix("private/") for name in north.values} == set(row.private)
    assert north.digest != south.digest
    start = fake.start("area", ours.setup.tasks["area"].layout)
    now = coordinator.tensors("area", row.after)
    assert np.array_equal(now.pick(row.private).flat, start.pick(row.private).flat)


def test_scaffold_corrects_towards_the_common_goal(fake: ModuleType, tmp_path: Path) -> None:
    """Sites with goals g_i of equal weight: the control c is the mean gradient, and corrected steps of all sites are alike."""
    holdings = {name: {"area": 30} for name in ("north", "south")}
    ours = federation(fake, tmp_path, {"kind": "scaffold"}, rounds=2, holdings=holdings)
    coordinator = ours.open()
    rounds = coordinator.run()
    first = coordinator.store.arrays(rounds[-1].tasks["area"].state)
    own = [site.own["area", 1] for site in ours.sites.values()]
    for role in ("A", "B", "head"):
        mean = np.mean([kept.values[f"control/{role}"] for kept in own], axis=0)
        np.testing.assert_allclose(first[f"control.{role}"], mean, atol=1e-6)
    sent = [envelope for site in ours.sites.values() for envelope in site.asked]
    assert all(("area#control" in envelope.arrays) == (envelope.kind == "train") for envelope in sent)


def test_controls_go_on_from_what_counted(fake: ModuleType, tmp_path: Path) -> None:
    """A site whose answer is refused keeps the control that the coordinator knows of: c stays the mean of the sites' controls."""
    holdings = {name: {"area": 30} for name in ("north", "south")}
    ours = federation(fake, tmp_path, {"kind": "scaffold"}, rounds=3, holdings=holdings)
    coordinator = ours.open()
    ours.sites["south"].twist = lambda result, _arrays: _heavy(result) if len(coordinator.history) == 2 else None
    rounds = coordinator.run()
    assert [list(row.tasks["area"].drops) for row in rounds] == [[], ["south"], []]
    plans = [task for e in ours.sites["south"].asked if e.kind == "train" for task in e.open(RoundPlan).tasks]
    assert [plan.counted_round for plan in plans] == [0, 1, 1]
    known = coordinator.store.arrays(rounds[-1].tasks["area"].state)  # before round 3: c moved by both, then by north alone
    north, south = (ours.sites[name].own for name in ("north", "south"))
    change = north["area", 2].values["control/B"] - north["area", 1].values["control/B"]
    first = (north["area", 1].values["control/B"] + south["area", 1].values["control/B"]) / 2
    np.testing.assert_allclose(known["control.B"], first + change, atol=1e-5)


def _heavy(result: Any) -> None:
    result.weight = 1000.0


def test_a_site_of_small_rank_moves_its_slots_alone(fake: ModuleType, tmp_path: Path) -> None:
    ours = federation(fake, tmp_path, {"kind": "slots", "pick": "prefix"}, rounds=1)
    for site in ours.sites.values():
        site.rank = 2
    assert isinstance(ours.setup.scheme, Masks)
    coordinator = ours.open()
    row = coordinator.run()[0].tasks["area"]
    before, after = (coordinator.tensors("area", digest).named()["x.lora_B"] for digest in (row.before, row.after))
    assert np.array_equal(before[:, 2:], after[:, 2:])
    assert not np.array_equal(before[:, :2], after[:, :2])


def test_drift_is_journalled_told_and_warned_about(fake: ModuleType, tmp_path: Path) -> None:
    ours = federation(fake, tmp_path, {"kind": "fedavg", "probes": 4})
    for site in ours.sites.values():
        site.pull = 1.0
    rounds = ours.open().run()
    drifts = [row.tasks["area"].drift["drift"] for row in rounds]
    assert all(0.0 < rho < 2.0 for rho in drifts)
    told = ours.named("drift")
    assert [row["tasks"]["area"]["drift"] for row in told] == drifts
    for row, rho in zip(told, drifts, strict=True):
        assert bool(row["warnings"]) == (rho > 0.5)
    assert any(rho > 0.5 for rho in drifts), drifts
    line = next(text for row in told for text in row["warnings"])
    assert line.startswith("averaging lost more than half of the update of task area in round ")
    assert line.endswith('take fewer local steps, or scheme.kind = "alternating"')


def test_what_a_gathering_scheme_truncates_is_told(fake: ModuleType, tmp_path: Path) -> None:
    ours = federation(fake, tmp_path, "flexlora", holdings=MANY)
    assert isinstance(ours.setup.scheme, Gathers)
    assert 0.0 < ours.open().run()[-1].tasks["area"].drift["lost"] < 1.0


RULES = [{"kind": "median"}, {"kind": "trimmed"}, {"kind": "krum"}, {"kind": "multikrum"}, {"kind": "rfa"}, {"kind": "norm_bound"}]
RULES += [{"kind": "bulyan", "f": 1}, {"kind": "buckets", "size": 2, "rule": {"kind": "median"}}, {"kind": "fltrust"}]


def robust(fake: ModuleType, folder: Path, rule: dict[str, Any] | None, liar: float = 0.0, **limits: Any) -> Any:
    ours = federation(fake, folder, "alternating", rounds=2, holdings=MANY)
    combine = None if rule is None else config.build(COMBINES, rule, "combine")
    ours.setup = replace(ours.setup, combine=combine, limits=replace(ours.setup.limits, root="s0", reach=256.0, **limits))

    def lie(result: Any, arrays: dict[str, bytes]) -> None:
        if result.task in arrays:
            fingerprint, codes = flat.unpack(arrays[result.task])
            arrays[result.task] = flat.pack(fingerprint, np.clip(-liar * codes.astype(np.float64), -(2**27), 2**27).astype(np.int32))

    if liar:
        ours.sites["s6"].twist = lie
    return ours


def moved_by_a_liar(fake: ModuleType, folder: Path, rule: dict[str, Any] | None) -> float:
    """How far from the adapter of the honest a liar takes it."""
    ends = []
    for liar in (0.0, 400.0):
        coordinator = robust(fake, folder / f"{liar}", rule, liar).open()
        row = coordinator.run()[-1].tasks["area"]
        assert row.outcome == "updated", row.reason
        ends.append(coordinator.tensors("area", row.after))
    return float((ends[1] - ends[0]).norm())


@pytest.fixture(scope="module")
def moved_sum(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> float:
    return moved_by_a_liar(fake, tmp_path_factory.mktemp("sum"), None)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["kind"])
def test_a_liar_moves_a_robust_mean_less_than_the_sum(fake: ModuleType, tmp_path: Path, moved_sum: float, rule: dict[str, Any]) -> None:
    assert moved_by_a_liar(fake, tmp_path, rule) < moved_sum / 2


def test_too_few_for_a_rule_is_a_named_skip(fake: ModuleType, tmp_path: Path) -> None:
    ours = robust(fake, tmp_path, {"kind": "krum", "f": 3})
    with pytest.raises(CohortError, match="krum: 7 parts came, this setting needs at least 9"):
        ours.open().run()


def test_fltrust_without_its_root_is_a_named_skip(fake: ModuleType, tmp_path: Path) -> None:
    ours = robust(fake, tmp_path, {"kind": "fltrust"})
    ours.sites["s0"].twist = lambda result, _arrays: _fail(result)
    with pytest.raises(CohortError, match=r"fltrust: site 's0' \(cohort\.root\) did not contribute"):
        ours.open().run()


def test_the_root_is_in_every_cohort(fake: ModuleType, tmp_path: Path) -> None:
    ours = robust(fake, tmp_path, {"kind": "fltrust"}, fraction=0.3)
    assert all("s0" in row.tasks["area"].cohort for row in ours.open().run())


def test_groups_that_lost_sites_join_their_neighbours() -> None:
    from fedpeft.update import Grid

    layout, grid = Layout.of([HEAD]), Grid(16)

    def total(count: int) -> Update:
        ones = Tensors(layout, np.full(layout.size, 0.5, np.float32))
        out = Update.zero(layout, grid)
        for _ in range(count):
            out = out + Update.encode(ones, 1.0, {}, grid)
        return out

    for counts in ([3, 0, 2, 1], [0, 0], [1, 1, 1, 1], [2], [2, 2, 1], [0, 3]):
        out = joined([total(count) for count in counts], 2)
        assert sum(one.count for one in out) == sum(counts)
        assert all(one.count >= 2 for one in out) or sum(counts) < 2


def test_a_site_that_claims_a_billion_rows_weighs_as_the_cap_allows(fake: ModuleType, tmp_path: Path) -> None:
    """ALGORITHMS E.14: counts are self-reported; `max_examples` is the most that one site can claim."""
    holdings = {"north": {"area": 40}, "south": {"area": 25}, "west": {"area": 10**9}}
    rows, ends = {}, {}
    for name, claim in (("honest", 50), ("liar", 10**9)):
        ours = federation(fake, tmp_path / name, "fedavg", rounds=1, holdings={**holdings, "west": {"area": claim}}, max_examples=50)
        coordinator = ours.open()
        rows[name] = coordinator.run()[0].tasks["area"]
        ends[name] = rows[name].after
    assert rows["liar"].weight_cap == rows["honest"].weight_cap == 50
    assert rows["liar"].weight == pytest.approx((40 + 25 + 50) / 50, abs=1e-5)
    assert ends["liar"] == ends["honest"]


def test_a_journal_of_an_earlier_version_goes_on(fake: ModuleType, tmp_path: Path) -> None:
    """Rows without the task's own round, private and settled roles, or drift, as an earlier version wrote them."""
    whole = fake.Federation(tmp_path / "whole", fake.setup(), fake.sites())
    whole.open().run()
    ours = fake.Federation(tmp_path / "old", fake.setup(), fake.sites())
    coordinator = ours.open()
    while len(coordinator.history) < 2 or coordinator.history[-1].step != "combined":
        coordinator.step()
    forget(ours.folder / "journal.sqlite")
    ours.open().run()
    assert ours.final() == whole.final()


def forget(path: Path) -> None:
    import json
    import sqlite3

    with sqlite3.connect(path) as journal:
        for number, text in journal.execute("SELECT number, tasks FROM rounds").fetchall():
            rows = json.loads(text)
            for row in rows.values():
                for name in ("number", "private", "settles", "drift"):
                    del row[name]
            journal.execute("UPDATE rounds SET tasks = ? WHERE number = ?", (json.dumps(rows), number))
    journal.close()
