"""Masked sums over real rounds: the same bits as in the clear, whoever drops out when and wherever the coordinator dies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedpeft.errors import CohortError, FedpeftError, PrivacyError
from fedpeft.privacy.packing import Schema
from fedpeft.privacy.secagg import Collector
from fedpeft.schemes import Sharing
from fedpeft.schemes.robust import Buckets
from fedpeft.tensors import Layout
from fedpeft.update import TRAIN_COUNTERS, Grid
from fedpeft.wire import Envelope, flat, masking
from fedpeft.wire.codecs import Int4, Ring
from fedpeft.wire.codecs.ring import packed_size
from fedpeft.wire.v1.federation_pb2 import Masking, RoundPlan, RoundReply, TaskResult
from fedpeft.wire.vector import Vector
from fedpeft_client.answers import Answer
from fedpeft_client.secure import Secure
from fedpeft_coordinator.setup import SecureAggregation
from fedpeft_coordinator.transport import Failure
from fedpeft_coordinator.updates import groups

MANY = {
    "east": {"area": 12, "kind": 9},
    "north": {"area": 40, "kind": 10},
    "south": {"area": 25, "kind": 3},
    "west": {"kind": 30, "area": 7},
}
STEPS = {"keys": 1, "shares": 2, "vector": 3, "agree": 4, "reveal": 5}


@dataclass
class Guarded:
    """A fake site behind a real `Secure`; ``left`` are the plain and the sent arrays of its vectors."""

    site: Any
    folder: Path
    left: list[tuple[str, np.ndarray, np.ndarray]] = field(default_factory=list)

    def __call__(self, envelope: Envelope) -> Envelope:
        if envelope.kind == "hello":
            return self.site(envelope)
        asked = envelope.open(RoundPlan)
        plans = {task.task: task for task in asked.tasks}
        secure, arrays = Secure(self.site.name, self.folder / self.site.name), {}
        if envelope.kind == "secure":
            return self._reply(asked, [self._try(plan.task, lambda plan=plan: Answer(secure.answer(asked, plan))) for plan in asked.tasks])
        plain = self.site(envelope)
        given = []
        for result in plain.open(RoundReply).results:
            answer = Answer(result, plain.arrays.get(result.task, b""))
            if result.status == TaskResult.STATUS_OK:
                answer = self._try(result.task, lambda a=answer: self._mask(secure, asked, plans[a.result.task], envelope.kind, a))
            given.append(answer)
            arrays |= {result.task: answer.array} if answer.array else {}
        return self._reply(asked, given, arrays)

    def _mask(self, secure: Secure, asked: RoundPlan, plan: Any, kind: str, answer: Answer) -> Answer:
        instance = secure.instance(asked, plan, kind)
        assert instance is not None
        assert plan.secure_aggregation
        if plan.masking.step == Masking.STEP_KEYS:
            return secure.keyed(asked, plan, answer)
        vector = Vector(Schema(Layout(()), Grid(len(instance.members)), masking.counters_of(plan.masking.counters)))
        if answer.array:
            fingerprint = answer.result.layout_fingerprint
            layout = next(self.site.layout.subset(r) for r in ({"B", "head"}, {"A", "head"}, {"A", "B", "head"})
                          if self.site.layout.subset(r).fingerprint == fingerprint)  # fmt: skip
            schema = Schema(layout, Grid(plan.grid_sites, plan.grid_reach), TRAIN_COUNTERS)
            vector = Vector(schema, self.site.lanes[plan.task] if plan.codec_json else None)
        sent = secure.masked(asked, plan, answer, vector)
        if answer.array:
            self.left.append((plan.task, flat.unpack(answer.array)[1], flat.unpack(sent.array)[1]))
        return sent

    def _try(self, task: str, work: Callable[[], Answer]) -> Answer:
        try:
            return work()
        except FedpeftError as fault:
            return Answer(TaskResult(task=task, status=TaskResult.STATUS_REFUSED, reason=str(fault)))

    def _reply(self, asked: RoundPlan, answers: list[Answer], arrays: dict[str, bytes] | None = None) -> Envelope:
        reply = RoundReply(site=self.site.name, run=asked.run, round=asked.round, base_loads=1, results=[one.result for one in answers])
        return Envelope.of("reply", reply, arrays or {})


def masked(fake: ModuleType, folder: Path, holdings: dict[str, dict[str, int]] | None = None, rounds: int = 3, **extra: Any) -> Any:
    settings = SecureAggregation(**extra.pop("secure", {}))
    setup = replace(fake.setup(rounds=rounds, tasks=("area", "kind"), min_sites=3, **extra), secure=settings)
    sites = {name: Guarded(site, folder / "sites") for name, site in fake.sites(holdings or MANY).items()}
    return fake.Federation(folder, setup, sites)


def clear(fake: ModuleType, folder: Path, holdings: dict[str, dict[str, int]] | None = None, rounds: int = 3, **extra: Any) -> Any:
    setup = fake.setup(rounds=rounds, tasks=("area", "kind"), min_sites=3, **extra)
    return fake.Federation(folder, setup, fake.sites(holdings or MANY))


@pytest.fixture(scope="module")
def plain(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    federation = clear(fake, tmp_path_factory.mktemp("plain"))
    federation.rounds = federation.open().run()
    return federation


def step_of(request: Envelope) -> str:
    """The step of secure aggregation that ``request`` carries, with the work that it comes beside."""
    if request.kind == "hello":
        return ""
    step = next((name for name, number in STEPS.items() if number == request.open(RoundPlan).tasks[0].masking.step), "")
    return f"{request.kind} {step}"


def test_adapters_weights_counters_and_scores_are_those_of_the_run_in_the_clear(fake: ModuleType, plain: Any, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path)
    rounds = federation.open().run()
    assert federation.final() == plain.final()
    for ours, theirs in zip(rounds, plain.rounds, strict=True):
        for name, row in ours.tasks.items():
            assert (row.weight, row.counters["train.loss"]) == (theirs.tasks[name].weight, theirs.tasks[name].counters["train.loss"])
            assert row.scores == theirs.tasks[name].scores
            assert row.card == theirs.tasks[name].card
            assert row.sealed
    assert not list((tmp_path / "blobs").glob(f"{rounds[-1].tasks['area'].sealed}*"))


def test_tasks_that_share_a_factor_need_nothing_but_their_sums(fake: ModuleType, tmp_path: Path) -> None:
    common, finals = fake.start("area").pick({"A"}), []
    for kind in (clear, masked):
        ours = kind(fake, tmp_path / kind.__name__, rounds=4, server="momentum")
        tasks = {name: replace(task, initial=lambda n=name: fake.start(n).patch(common)) for name, task in ours.setup.tasks.items()}
        ours.setup = replace(ours.setup, tasks=tasks, sharing=Sharing("A", report=True))
        last = ours.open().run()[-1]
        assert all(row.gain for row in last.tasks.values())
        finals.append((ours.final(), {name: row.gain for name, row in last.tasks.items()}))
    assert finals[0] == finals[1]


def test_nothing_in_the_clear_is_on_the_wire(fake: ModuleType, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=1)
    sent: list[Envelope] = []
    for name, site in list(federation.sites.items()):
        federation.sites[name] = lambda envelope, site=site: sent.append(reply := site(envelope)) or reply
        federation.sites[name].site = site
    federation.open().run()
    results = [result for reply in sent for result in (reply.open(RoundReply).results if b"base" not in reply.body else [])]
    assert all(result.weight == 0 and not result.counters for result in results)
    left = [row for site in federation.sites.values() for row in site.site.left]
    assert len(left) == 8
    wire = b"".join(array for reply in sent for array in reply.arrays.values())
    for _, codes, vector in left:
        assert codes.tobytes()[:32] not in wire
        assert vector.tobytes()[:32] in wire


@pytest.mark.parametrize("step", ["secure keys", "secure shares", "train vector", "secure agree", "secure reveal"])
def test_a_site_that_vanishes_at_any_step_is_a_drop_out(fake: ModuleType, tmp_path: Path, step: str) -> None:
    federation = masked(fake, tmp_path, rounds=1)

    def fault(site: str, request: Envelope) -> Failure | None:
        return Failure("vanished", vanished=True) if site == "west" and step_of(request) == step else None

    rows = federation.open(fault=fault).run()[0].tasks
    before = step in ("secure keys", "secure shares", "train vector")
    others = {name: holds for name, holds in MANY.items() if name != "west"} if before else MANY
    oracle = clear(fake, tmp_path / "oracle", others, rounds=1)
    oracle.open().run()
    if before:
        # the cap of the weights and the grid are those of the planned cohort
        assert rows["area"].drops == {"west": "vanished"}
        assert rows["area"].weight == pytest.approx((12 + 40 + 25) / 40, abs=3e-6)
    else:
        assert rows["area"].drops == {}
        assert federation.final() == oracle.final()
    assert {row.outcome for row in rows.values()} == {"updated"}


def test_too_few_to_open_are_asked_again_and_then_refused(fake: ModuleType, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=1)
    gone = {"west", "south"}

    def fault(site: str, request: Envelope) -> Failure | None:
        return Failure("is busy") if site in gone and step_of(request) == "train vector" else None

    with pytest.raises(CohortError, match=r"2 of 4 sites delivered, 3 are needed; nothing is opened"):
        federation.open(fault=fault).run()
    assert len(federation.named("combined")) == 3
    gone.clear()
    federation.open().run()
    oracle = clear(fake, tmp_path / "oracle", rounds=1)
    oracle.open().run()
    assert federation.final() == oracle.final()


def test_a_sum_that_cannot_be_opened_is_skipped_and_the_next_round_goes_on(fake: ModuleType, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=2)

    def fault(site: str, request: Envelope) -> Failure | None:
        late = step_of(request) == "secure reveal" and request.open(RoundPlan).round == 1
        return Failure("is busy") if late and site != "east" else None

    first, second = federation.open(fault=fault).run()
    assert {row.outcome for row in first.tasks.values()} == {"skipped"}
    assert "shares of its secret came" in first.tasks["area"].reason
    assert {row.outcome for row in second.tasks.values()} == {"updated"}
    assert [row.number for row in (first.tasks["area"], second.tasks["area"])] == [1, 1]


@pytest.mark.parametrize(("point", "before"), [(3, True), (6, False), (10, True), (13, False)])
def test_a_crash_at_a_commit_gives_the_same_bits(fake: ModuleType, plain: Any, tmp_path: Path, point: int, before: bool) -> None:
    federation = masked(fake, tmp_path)
    coordinator = federation.open()
    fake.crash_at(coordinator, point, before)
    with pytest.raises(fake.Crash):
        coordinator.run()
    federation.open().run()
    assert federation.final() == plain.final()


def test_crashes_before_and_after_every_commit_give_the_same_bits(fake: ModuleType, plain: Any, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path)
    assert fake.crash_everywhere(federation) >= 2 * 15
    assert federation.final() == plain.final()


def test_crashes_within_every_step_give_the_same_bits(fake: ModuleType, plain: Any, tmp_path: Path) -> None:
    """One after the other, at the first and at the third message of each step."""
    steps = ("secure keys", "secure shares", "train vector", "secure agree", "secure reveal", "evaluate vector")
    federation, due = masked(fake, tmp_path), {(step, count) for step in steps for count in (1, 3)}
    seen: Counter[str] = Counter()

    def fault(_site: str, request: Envelope) -> Failure | None:
        seen[step_of(request)] += 1
        here = (step_of(request), seen[step_of(request)])
        if here in due:
            due.remove(here)
            raise fake.Crash
        return None

    while due:
        seen.clear()
        with pytest.raises(fake.Crash):
            federation.open(fault=fault).run()
    federation.open().run()
    assert federation.final() == plain.final()
    assert federation.open().history[-1].tasks["area"].scores == plain.rounds[-1].tasks["area"].scores


def bend(federation: Any, name: str, change: Callable[[Any], None]) -> None:
    """Let the coordinator tell site ``name`` something else than the rest."""
    site = federation.sites[name]

    def bent(envelope: Envelope) -> Envelope:
        if envelope.kind == "hello":
            return site(envelope)
        asked = envelope.open(RoundPlan)
        for task in asked.tasks:
            change(task)
        return site(Envelope.of(envelope.kind, asked, envelope.arrays))

    federation.sites[name] = bent


def fewer_survivors(task: Any) -> None:
    if task.masking.step == STEPS["agree"]:
        del task.masking.survivors[-1]


def invented_member(task: Any) -> None:
    if task.masking.step == STEPS["keys"]:
        task.masking.instance.members.append("zombie")


def another_seed(task: Any) -> None:
    if task.masking.step == STEPS["vector"]:
        task.seed += 1


def counters_elsewhere(task: Any) -> None:
    if task.masking.step == STEPS["vector"] and task.masking.counters:
        task.masking.counters["aa"] = 1


def another_name(task: Any) -> None:
    if task.masking.step == STEPS["agree"]:
        task.masking.name = task.masking.name[:-1] + "x"


LIES = {
    "signature of 'east' on the survivors does not hold": fewer_survivors,
    "are not signed by the identity it is known by": invented_member,
    "the masked sum is for another plan": another_seed,
    "this site gave no keys": another_name,
    "masked values, the plan needs": counters_elsewhere,
}


@pytest.mark.parametrize("reason", LIES)
def test_a_site_that_is_told_something_else_is_never_part_of_a_sum(fake: ModuleType, tmp_path: Path, reason: str) -> None:
    federation = masked(fake, tmp_path, rounds=1)
    bend(federation, "east", LIES[reason])
    federation.open().run()
    said = [why for row in federation.named("answer") for why in row["outcomes"].values() if why != "ok"]
    assert any(reason in why for why in said), said


def test_counters_of_another_length_are_a_named_drop_out(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = masked(fake, tmp_path, rounds=1)
    east, scores = federation.sites["east"].site, fake.Site._scores
    monkeypatch.setattr(
        fake.Site,
        "_scores",
        lambda self, begin, task: scores(self, begin, task) | ({"embedding.count": (1.0, 1.0)} if self is east else {}),
    )
    federation.setup = replace(federation.setup, evaluate_every=1)
    row = federation.open().run()[0].tasks["area"]
    said = [row["outcomes"]["area"] for row in federation.named("answer") if row["site"] == "east" and row["kind"] == "evaluate"]
    assert "counter embedding.count: 2 values, 1 were asked for" in said[0]
    assert row.scores
    assert row.moments
    assert not federation.named("unscored")


def test_a_site_with_a_new_identity_is_a_drop_out_until_it_is_listed(fake: ModuleType, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=1)
    federation.open().run()
    (tmp_path / "sites" / "west" / "identity").rename(tmp_path / "old")
    federation.setup = replace(federation.setup, rounds=2)
    row = federation.open().run()[-1].tasks["area"]
    assert list(row.drops) == ["west"]
    assert "not signed by the identity it is known by" in row.drops["west"]
    assert row.outcome == "updated"
    key = Secure("west", tmp_path / "sites" / "west").keys.public()
    for name in ("east", "north", "south"):
        (tmp_path / "sites" / name / "peers.json").unlink()
    federation.setup = replace(federation.setup, rounds=3, secure=SecureAggregation(identities={"west": key}))
    assert federation.open().run()[-1].tasks["area"].drops == {}


def test_a_spoiled_share_releases_nothing(fake: ModuleType, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=1)
    honest = federation.sites["east"]

    def spoil(envelope: Envelope) -> Envelope:
        reply = honest(envelope)
        if step_of(envelope) != "secure reveal":
            return reply
        body = reply.open(RoundReply)
        for result in body.results:
            for name in list(result.masked.reveal.seeds):
                result.masked.reveal.seeds[name] = bytes(32)
        return Envelope.of("reply", body)

    federation.sites["east"] = spoil
    gone = lambda site, request: Failure("is busy") if site == "west" and step_of(request) == "secure reveal" else None  # noqa: E731
    row = federation.open(fault=gone).run()[0].tasks["area"]
    assert row.outcome == "skipped"
    assert "tampered with" in row.reason


def test_fewer_than_three_test_sites_are_not_scored_by_name(fake: ModuleType, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=2)

    def fault(site: str, request: Envelope) -> Failure | None:
        return Failure("is busy") if site in ("west", "south") and request.kind == "evaluate" else None

    rows = federation.open(fault=fault).run()[-1].tasks
    assert rows["area"].scores == {}
    assert "2 of 4 sites published keys, 3 are needed" in federation.named("unscored")[0]["tasks"]["area"]


def test_a_vector_of_another_size_and_garbage_are_named(fake: ModuleType, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=1)
    honest = federation.sites["east"]

    def short(envelope: Envelope) -> Envelope:
        reply = honest(envelope)
        if step_of(envelope) != "train vector":
            return reply
        arrays = {name: flat.pack(flat.unpack(data)[0], flat.unpack(data)[1][:-1]) for name, data in reply.arrays.items()}
        return Envelope("reply", reply.body, arrays)

    federation.sites["east"] = short
    row = federation.open().run()[0].tasks["area"]
    assert "masked values, the plan needs" in row.drops["east"]
    assert row.outcome == "updated"
    with pytest.raises(PrivacyError):
        masking.work_of("a/b/c", "a", 1, "c")


CROWD = {f"s{number:02}": {"area": 20 + number} for number in range(13)}
OVER = {"server": "sgd", "reach": 64.0}


def grouped(fake: ModuleType, folder: Path, secure: bool = True, rounds: int = 2, **extra: Any) -> Any:
    """Thirteen sites in four groups, under the geometric median of the groups."""
    made = fake.setup(rounds=rounds, tasks=("area",), min_sites=9, **{**OVER, **extra})
    settings = SecureAggregation(least=9, grouped=3) if secure else None
    setup = replace(made, combine=Buckets(3), secure=settings, evaluate_every=0)
    sites = fake.sites(CROWD)
    return fake.Federation(folder, setup, {name: Guarded(site, folder / "sites") if secure else site for name, site in sites.items()})


@pytest.mark.parametrize("codec", [{}, {"codec": Ring(6, 8)}], ids=["wide", "narrow"])
def test_a_rule_over_masked_sums_of_groups_gives_the_bits_of_the_clear(fake: ModuleType, tmp_path: Path, codec: dict[str, Any]) -> None:
    ours, oracle = grouped(fake, tmp_path, **codec), grouped(fake, tmp_path / "clear", secure=False, **codec)
    rounds = ours.open().run()
    oracle.open().run()
    assert all((row.tasks["area"].outcome, row.tasks["area"].ring is not None) == ("updated", bool(codec)) for row in rounds)
    assert ours.final() == oracle.final()
    parted = [groups(ours.setup, row.tasks["area"]) for row in rounds]
    assert sorted(map(len, parted[0])) == [3, 3, 3, 4]
    assert parted[0] != parted[1]  # dealt anew in every round


def test_no_sum_over_fewer_than_a_group_is_ever_opened(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, ...]] = []
    result = Collector.result
    monkeypatch.setattr(Collector, "result", lambda self, schema: (opened.append(self.survivors), result(self, schema))[1])
    federation = grouped(fake, tmp_path, rounds=1)
    row = federation.open().run()[0].tasks["area"]
    assert sorted(map(sorted, opened[:4])) == sorted(map(sorted, groups(federation.setup, row)))
    assert {len(survivors) for survivors in opened[4:]} == {len(CROWD)}  # the evaluations


@pytest.mark.parametrize("step", ["train vector", "secure reveal"])
def test_a_group_that_is_lost_takes_its_sites_with_it_and_no_others(fake: ModuleType, tmp_path: Path, step: str) -> None:
    federation = grouped(fake, tmp_path, rounds=1)
    planned = grouped(fake, tmp_path / "plan", rounds=1).open()
    planned.step()
    gone = next(group for group in groups(federation.setup, planned.history[0].tasks["area"]) if len(group) == 3)

    def fault(site: str, request: Envelope) -> Failure | None:
        return Failure("is busy") if site in gone[:2] and step_of(request) == step else None

    row = federation.open(fault=fault).run()[0].tasks["area"]
    assert row.outcome == "updated"
    assert set(row.drops) == set(gone)
    held = {name: holds for name, holds in CROWD.items() if name not in gone}
    assert row.weight == pytest.approx(sum(holds["area"] for holds in held.values()) / 32, abs=2e-5)


def test_liars_in_one_group_do_not_move_a_rule_over_groups(fake: ModuleType, tmp_path: Path) -> None:
    honest, lied, summed = (grouped(fake, tmp_path / name, rounds=1) for name in ("honest", "lied", "summed"))
    summed.setup = replace(summed.setup, combine=None)
    planned = grouped(fake, tmp_path / "plan", rounds=1).open()
    planned.step()
    liars = groups(honest.setup, planned.history[0].tasks["area"])[0]
    for federation in (lied, summed):
        for name in liars:
            federation.sites[name].site.pull = -20.0
    moved = {}
    for name, federation in (("honest", honest), ("lied", lied), ("summed", summed)):
        coordinator = federation.open()
        row = coordinator.run()[0].tasks["area"]
        moved[name] = coordinator.tensors("area", row.after).flat
    away = {name: float(np.linalg.norm(moved[name] - moved["honest"])) for name in ("lied", "summed")}
    assert away["summed"] > 10 * away["lied"] > 0


def test_crashes_before_and_after_every_commit_give_the_same_bits_with_groups(fake: ModuleType, tmp_path: Path) -> None:
    whole, federation = grouped(fake, tmp_path / "whole", secure=False, rounds=1), grouped(fake, tmp_path, rounds=1)
    whole.open().run()
    assert fake.crash_everywhere(federation) >= 2 * 5
    assert federation.final() == whole.final()


NARROW: dict[str, Any] = {"codec": Ring(4, 8), "reach": 16.0}


@pytest.fixture(scope="module")
def narrow(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """In the clear, in as few bits."""
    federation = clear(fake, tmp_path_factory.mktemp("narrow"), rounds=4, **NARROW)
    federation.rounds = federation.open().run()
    return federation


def test_narrow_sums_under_masks_are_those_of_the_same_codes_in_the_clear(
    fake: ModuleType, plain: Any, narrow: Any, tmp_path: Path
) -> None:
    federation = masked(fake, tmp_path, rounds=4, **{**NARROW, "codec": Int4(8)})
    rounds = federation.open().run()
    assert federation.final() == narrow.final() != plain.final()
    for ours, theirs in zip(rounds, narrow.rounds, strict=True):
        for name, row in ours.tasks.items():
            assert (row.mean, row.weight, row.scores) == (theirs.tasks[name].mean, theirs.tasks[name].weight, theirs.tasks[name].scores)
            assert row.ring == {"kind": "ring", "bits": 8 if ours.number < 3 else 4, "block": 8, "headroom": 4.0}
    up = {len(vector) for site in federation.sites.values() for _, _, vector in site.left}
    # 10 of A or B and 12 of the head, 2 bits more than a site's for the sum of 4; weight and 21 limbs beside
    assert up == {packed_size(22, 10) + 4 * 21, packed_size(22, 6) + 4 * 21}


def test_scales_follow_the_last_mean_of_the_same_tensors(narrow: Any) -> None:
    asked = [envelope.open(RoundPlan) for envelope in narrow.sites["east"].asked if envelope.kind == "train"]
    scales = [next(task.scales for task in plan.tasks if task.task == "area") for plan in asked]
    rows = [past.tasks["area"] for past in narrow.rounds]
    assert len(set(scales[0])) == 1  # of what training can move, the same for all blocks
    assert set(rows[1].means.values()) == {rows[0].mean, rows[1].mean}
    assert set(rows[3].means.values()) == {rows[2].mean, rows[3].mean}
    store = narrow.open().store
    kept = store.tensors(rows[2].mean, narrow.sites["east"].layout.subset({"B", "head"}))  # for the next round that moves B
    assert kept.flat.any()
    assert scales[2] != scales[0]


def test_a_budget_narrows_masked_sums_and_a_task_that_it_cannot_hold_is_skipped_by_name(fake: ModuleType, tmp_path: Path) -> None:
    rows = masked(fake, tmp_path / "a", rounds=1, budget=4 * 26 + packed_size(22, 8)).open().run()[0].tasks
    assert {row.ring["bits"] for row in rows.values()} == {6}
    assert masked(fake, tmp_path / "b", rounds=1, budget=1000).open().run()[0].tasks["area"].ring is None
    with pytest.raises(CohortError, match=r"wire\.budget: 90 bytes for 22 values"):
        masked(fake, tmp_path / "c", rounds=1, budget=90, secure={}).open().run()


def test_crashes_before_and_after_every_commit_give_the_same_narrow_bits(fake: ModuleType, narrow: Any, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=4, **NARROW)
    assert fake.crash_everywhere(federation) >= 2 * 16
    assert federation.final() == narrow.final()


def test_a_site_that_is_told_other_scales_is_never_part_of_a_sum(fake: ModuleType, tmp_path: Path) -> None:
    def other_scales(task: Any) -> None:
        if task.masking.step == STEPS["vector"] and task.scales:
            task.scales = bytes([task.scales[0] - 1]) + task.scales[1:]

    federation = masked(fake, tmp_path, rounds=1, **NARROW)
    bend(federation, "east", other_scales)
    row = federation.open().run()[0].tasks["area"]
    assert "the masked sum is for another plan" in row.drops["east"]
    assert row.outcome == "updated"
