"""The state machine: any crash point gives the same bits, order is irrelevant, every drop-out has a name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.coordinator.crashes import Crash, crash_at, crash_everywhere

from fedpeft.errors import CohortError, ConfigError
from fedpeft.tensors import Tensors
from fedpeft.wire import Envelope, flat
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.transport import Failure


@pytest.fixture(scope="module")
def undisturbed(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    federation = fake.Federation(tmp_path_factory.mktemp("undisturbed"), fake.setup(), fake.sites())
    federation.open().run()
    return federation.final()


def test_runs_to_the_end_and_publishes_once(fake: ModuleType, tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(), fake.sites())
    rounds = federation.open().run()
    assert [row.number for row in rounds] == [1, 2, 3, 4]
    assert all(row.step == "published" for row in rounds)
    assert [task for task, _, _ in federation.published] == ["area", "kind"]
    release = federation.published[0][2]
    assert release.metrics["base.accuracy"] == 0.01
    assert release.card["centroid"] == pytest.approx([0.6, 0.8])
    assert release.card["count"] == 3 * sum(range(64))
    assert -1 < release.card["threshold"] < 1
    assert release.router.moments.own.count == 3 * 5
    assert release.router.moments.own.mean == pytest.approx([0.6, 0.8])
    assert release.router.counts["mahalanobis"] == release.router.counts["closeness.text"] == tuple(3.0 * i for i in range(64))
    assert release.router.moments.own.ngrams[0] == 3.0


def test_a_task_that_nobody_holds_is_untouched(fake: ModuleType, tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(), fake.sites())
    last = federation.open().run()[-1]
    assert last.tasks["thing"].current == fake.start("thing").digest
    assert last.tasks["thing"].outcome == "skipped"
    assert "0 site(s) hold it" in last.tasks["thing"].reason
    assert last.tasks["area"].current != fake.start("area").digest


def test_the_mean_is_the_weighted_mean(fake: ModuleType, tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(rounds=1, scheme="fedavg", server="sgd"), fake.sites())
    coordinator = federation.open()
    row = coordinator.run()[0].tasks["area"]
    begin = fake.start("area").flat.astype(np.float64)
    weights = {name: holds["area"] for name, holds in fake.HOLDINGS.items()}
    deltas = {name: 0.25 * (fake.goal(name, "area") - begin) + (row.seed % 7) / 1000 for name in weights}
    oracle = begin + sum(weights[name] * deltas[name] for name in weights) / sum(weights.values())
    np.testing.assert_allclose(coordinator.tensors("area", row.current).flat, oracle, atol=1e-6)
    assert row.counters["train.loss"] == (7.5, 6.0)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.randoms(use_true_random=False))
def test_order_of_arrival_is_irrelevant(fake: ModuleType, undisturbed: dict[str, str], tmp_path_factory, order) -> None:  # type: ignore[no-untyped-def]
    federation = fake.Federation(tmp_path_factory.mktemp("order"), fake.setup(), fake.sites())
    federation.open(order=lambda names: order.sample(names, len(names))).run()
    assert federation.final() == undisturbed


@pytest.mark.parametrize("before", [True, False], ids=["before the commit", "after the commit"])
@pytest.mark.parametrize("point", [4, 14, 24])
def test_a_crash_at_a_commit_gives_the_same_bits(
    fake: ModuleType, undisturbed: dict[str, str], tmp_path: Path, point: int, before: bool
) -> None:
    federation = fake.Federation(tmp_path, fake.setup(), fake.sites())
    coordinator = federation.open()
    crash_at(coordinator, point, before)
    with pytest.raises(Crash):
        coordinator.run()
    federation.open().run()
    assert federation.final() == undisturbed


def test_crashes_before_and_after_every_commit_give_the_same_bits(fake: ModuleType, undisturbed: dict[str, str], tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(), fake.sites())
    assert crash_everywhere(federation) == 2 * 24
    assert federation.final() == undisturbed


def test_crash_while_collecting(fake: ModuleType, undisturbed: dict[str, str], tmp_path: Path) -> None:
    for count in (1, 3, 4, 8):
        federation = fake.Federation(tmp_path / str(count), fake.setup(), fake.sites())
        asked = 0

        def fault(_site: str, request: Envelope) -> Failure | None:
            nonlocal asked
            asked += request.kind == "train"
            if asked == count:  # noqa: B023 - used within the iteration
                raise Crash
            return None

        with pytest.raises(Crash):
            federation.open(fault=fault).run()
        federation.open().run()
        assert federation.final() == undisturbed


def paused(fake: ModuleType, folder: Path, seconds: float) -> dict[str, str]:
    """The final digests of six rounds over sites that take ``seconds`` for each task."""
    federation = fake.Federation(folder, fake.setup(rounds=6), {name: fake.slow(site, seconds) for name, site in fake.sites().items()})
    federation.open().run()
    return federation.final()


def test_kill_minus_nine_of_real_processes(fake: ModuleType, tmp_path: Path, forked: Callable[..., Any]) -> None:
    """One process after the other on the same folder, each killed later than the last; on a busy machine all but the first may end."""
    codes = []
    for seconds, pause in ((0.02, 600.0), (0.1, 0.05), (0.2, 0.05), (0.3, 0.05)):
        killed = forked(lambda _say: paused(fake, tmp_path / "cut", pause))  # noqa: B023 - used within the iteration
        time.sleep(seconds)
        codes.append(killed.end(kill=True)[1])
    assert codes[0] == -9
    assert set(codes) <= {-9, 0}
    assert paused(fake, tmp_path / "cut", 0.0) == paused(fake, tmp_path / "whole", 0.0)


def test_only_what_changed_travels_down(fake: ModuleType, tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(rounds=3), fake.sites({"south": {"area": 25}}))
    federation.setup = replace(fake.setup(rounds=3, tasks=("area",)), evaluate_every=0)
    federation.open().run()
    sent = [e for e in federation.sites["south"].asked if e.kind == "train"]
    sizes = [flat.unpack(e.arrays["area"])[1].size for e in sent]
    full, a, b, head = fake.LAYOUT.size, 10, 10, 12
    assert sizes == [full, b + head, a + head]


def test_a_site_that_lost_its_copy_is_sent_the_whole(fake: ModuleType, undisturbed: dict[str, str], tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(), fake.sites())
    coordinator = federation.open()
    while len(coordinator.history) < 3:
        coordinator.step()
    federation.sites["north"].kept.clear()
    coordinator.run()
    assert federation.final() == undisturbed


def test_another_federation_on_the_same_state_is_refused(fake: ModuleType, tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(rounds=1), fake.sites())
    federation.open().run()
    federation.setup = fake.setup(rounds=1, scheme="fedavg")
    with pytest.raises(ConfigError, match=r"other settings \(scheme\)"):
        federation.open()


def test_more_rounds_go_on_where_it_ended(fake: ModuleType, undisturbed: dict[str, str], tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(rounds=2), fake.sites())
    federation.open().run()
    federation.setup = fake.setup(rounds=4)
    federation.open().run()
    assert federation.final() == undisturbed


def test_a_fraction_of_the_sites_is_drawn_from_the_seed(fake: ModuleType, tmp_path: Path) -> None:
    many = {f"s{i}": {"area": 5} for i in range(10)}
    drawn = []
    for name in ("one", "two"):
        federation = fake.Federation(tmp_path / name, fake.setup(rounds=4, fraction=0.3), fake.sites(many))
        drawn.append([row.tasks["area"].cohort for row in federation.open().run()])
    assert drawn[0] == drawn[1]
    assert {len(cohort) for cohort in drawn[0]} == {3}
    assert len(set(drawn[0])) > 1


def test_a_wrong_base_is_refused_by_name(fake: ModuleType, tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, replace(fake.setup(rounds=1), identity="a" * 64), fake.sites())
    federation.sites["west"].identity = "b" * 64
    coordinator = federation.open()
    row = coordinator.run()[0].tasks["area"]
    assert row.cohort == ("north", "south")
    assert "holds base bbbbbbbbbbbb" in coordinator.roster.sites["west"].refused


def test_nobody_comes(fake: ModuleType, tmp_path: Path) -> None:
    base = fake.setup(wait_for_sites=5)
    federation = fake.Federation(tmp_path, replace(base, limits=replace(base.limits, deadline=0.3)), fake.sites())
    with pytest.raises(CohortError, match=r"3 of 5 sites said hello within 0\.3 s"):
        federation.open().run()


def test_old_blobs_are_pruned_and_torn_ones_noticed(fake: ModuleType, tmp_path: Path) -> None:
    from fedpeft.errors import StorageError

    federation = fake.Federation(tmp_path, fake.setup(), fake.sites())
    coordinator = federation.open()
    coordinator.run()
    assert len(list((tmp_path / "blobs").iterdir())) <= 6 * len(fake.TASKS)  # adapters and states, two of each; moments, and their measure
    digest = federation.final()["area"]
    path = tmp_path / "blobs" / f"{digest}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StorageError, match="torn"):
        coordinator.store.tensors(digest, fake.LAYOUT)


def test_journal_gives_back_what_it_took(fake: ModuleType, tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(), fake.sites())
    rounds = federation.open().run()
    assert Journal(f"sqlite:///{tmp_path / 'journal.sqlite'}").rounds() == rounds
    assert isinstance(federation.open().tensors("area"), Tensors)


def test_sites_that_come_back_after_the_coordinator_did_are_waited_for_to_score_what_is_published(fake: ModuleType, tmp_path: Path) -> None:
    federation = fake.Federation(tmp_path, fake.setup(rounds=1), fake.sites())
    coordinator = federation.open()
    while not (coordinator.history and coordinator.history[-1].step == "committed"):
        coordinator.step()
    nobody_yet = federation.open(fault=lambda _site, request: Failure("is away") if request.kind == "hello" else None)
    assert nobody_yet.roster.refresh()
    assert not nobody_yet.roster.present
    assert nobody_yet.run()[-1].tasks["area"].scores["accuracy"] > 0
    assert federation.published[0][2].metrics["accuracy"] > 0
