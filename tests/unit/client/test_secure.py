"""The site's half of masked sums: what it believes, signs once, refuses, and lets leave."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedpeft.errors import PolicyError, PrivacyError
from fedpeft.privacy.packing import Schema, unpack
from fedpeft.privacy.secagg import Collector, Instance
from fedpeft.tensors import Entry, Layout, Tensors
from fedpeft.update import TRAIN_COUNTERS, Grid, Update
from fedpeft.wire import masking
from fedpeft.wire.v1.federation_pb2 import Masked, Masking, RoundPlan, TaskPlan
from fedpeft.wire.vector import Vector
from fedpeft_client import answers
from fedpeft_client.answers import Answer
from fedpeft_client.marks import Marks
from fedpeft_client.secure import Secure

NAMES = ("east", "north", "south", "west")
LAYOUT, GRID = Layout.of([Entry("B", "b", (40, 3))]), Grid(4)
SCHEMA = Schema(LAYOUT, GRID, TRAIN_COUNTERS)
ROUND = RoundPlan(federation="f", run="r", round=1)


def task(**changes) -> TaskPlan:
    return TaskPlan(**{"task": "kinds", "seed": 7, "secure_aggregation": True, **changes})


def update(name: str) -> Update:
    values = np.random.default_rng(sum(map(ord, name))).normal(size=LAYOUT.size).astype(np.float32) / 10
    return Update.encode(Tensors(LAYOUT, values), 0.5, {"train.loss": (1.5, 2.0), "train.examples": (9.0,)}, GRID)


class Run:
    """An honest coordinator's calls, step by step, that a test may bend; sites are made anew for every call, as after a restart."""

    def __init__(self, folder: Path, asked: RoundPlan = ROUND, nonce: str = "1", plan: TaskPlan | None = None, **site) -> None:
        self.folder, self.asked, self.plan, self.settings = folder, asked, plan or task(), site
        name = f"{masking.purpose(asked.run, asked.round, 'train', self.plan)}#{nonce}"
        self.collector = Collector(Instance(name, NAMES))

    def site(self, name: str) -> Secure:
        return Secure(name, self.folder / name, **self.settings)

    def step(self, name: str, step: int, **fields) -> Masked:
        plan = TaskPlan(task="kinds", masking=Masking(step=step, name=self.collector.instance.name, **fields))
        return self.site(name).answer(self.asked, plan).masked

    def keys(self, *names: str) -> None:
        for name in names or NAMES:
            said = self.step(name, Masking.STEP_KEYS, instance=masking.instance_message(self.collector.instance))
            self.collector.add_bundle(masking.bundle_of(said.bundle))

    def shares(self, *names: str) -> None:
        for name in names or NAMES:
            said = self.step(name, Masking.STEP_SHARES, bundles=map(masking.bundle_message, self.collector.bundles_for(name)))
            self.collector.add_boxes(name, masking.boxes_of(said.boxes))

    def vector(self, name: str, plan: TaskPlan | None = None, given: Update | None = None) -> Answer:
        sent = TaskPlan()
        sent.CopyFrom(plan or self.plan)
        boxes = map(masking.box_message, self.collector.boxes_for(name))
        sent.masking.CopyFrom(
            Masking(step=Masking.STEP_VECTOR, name=self.collector.instance.name, boxes=boxes, dealers=self.collector.dealers)
        )
        site = self.site(name)
        assert site.instance(self.asked, sent, "train") == self.collector.instance
        return site.masked(self.asked, sent, answers.of_update("kinds", given or update(name), 1.0, "d"), Vector(SCHEMA))

    def vectors(self, *names: str) -> None:
        for name in names or NAMES:
            left = self.vector(name)
            assert left.result.weight == 0
            assert not left.result.counters
            self.collector.add_vector(name, answers.flat.unpack(left.array)[1].astype(np.int32))

    def agree(self, name: str, *survivors: str) -> bytes:
        return self.step(name, Masking.STEP_AGREE, survivors=survivors or self.collector.survivors).signature

    def open(self, *names: str) -> Update:
        for name in names or self.collector.survivors:
            self.collector.add_agreement(name, self.agree(name))
        for name in names or self.collector.survivors:
            said = self.step(name, Masking.STEP_REVEAL, signatures=self.collector.signatures_for(name))
            self.collector.add_reveal(masking.reveal_of(name, said.reveal))
        return unpack(self.collector.result(SCHEMA.digest), SCHEMA, len(self.collector.survivors))

    def until_vectors(self, *names: str) -> Run:
        self.keys()
        self.shares()
        self.vectors(*names)
        return self


def plain(*names: str) -> Update:
    total = Update.zero(LAYOUT, GRID)
    for name in names or NAMES:
        total = total + update(name)
    return total


@pytest.mark.parametrize("survivors", [NAMES, NAMES[1:]])
def test_sites_restarted_at_every_step_give_the_plain_sum(tmp_path: Path, survivors: tuple[str, ...]) -> None:
    total = Run(tmp_path).until_vectors(*survivors).open()
    oracle = plain(*survivors)
    assert np.array_equal(total.codes, oracle.codes)
    assert (total.weight, total.count) == (oracle.weight, len(survivors))
    assert {name: total.counters[name] for name in oracle.counters} == oracle.counters
    assert total.counters["train.tokens"] == (0.0,)


def test_secrets_are_readable_by_their_owner_alone_and_go_when_the_round_is_over(tmp_path: Path) -> None:
    first = Run(tmp_path).until_vectors()
    files = list((tmp_path / "east" / "secure").rglob("*.json"))
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600]
    assert (tmp_path / "east" / "identity" / "signing.key").stat().st_mode & 0o777 == 0o600
    first.open()
    later = Run(tmp_path, RoundPlan(federation="f", run="r", round=2))
    later.keys("east")
    assert not files[0].exists()
    with pytest.raises(PrivacyError, match="gave no keys"):
        first.agree("east")


def test_one_round_goes_into_one_sum(tmp_path: Path) -> None:
    first = Run(tmp_path).until_vectors()
    second = Run(tmp_path, nonce="2").until_vectors("east", "north", "south")
    first.agree("east")
    with pytest.raises(PrivacyError, match="in another sum already"):
        second.agree("east")
    with pytest.raises(PrivacyError, match="in another sum already"):
        Run(tmp_path, nonce="3").until_vectors().agree("east")


def test_the_same_values_under_another_name_go_into_sums_over_the_same_sites_only(tmp_path: Path) -> None:
    Run(tmp_path).until_vectors().open()
    again = RoundPlan(federation="f", run="another", round=1)
    assert Run(tmp_path, again).until_vectors().open().count == 4
    with pytest.raises(PrivacyError, match="over other sites"):
        Run(tmp_path, RoundPlan(federation="f", run="third", round=1)).until_vectors(*NAMES[1:]).agree("west")


def test_a_lie_about_survivors_is_not_signed_twice(tmp_path: Path) -> None:
    run = Run(tmp_path).until_vectors()
    run.agree("east", "east", "north", "south")
    with pytest.raises(PrivacyError, match="in another sum already, or were in one over other sites"):
        run.agree("east", *NAMES)
    with pytest.raises(PrivacyError, match="not among them"):
        run.agree("north", "east", "south", "west")
    with pytest.raises(PrivacyError, match="survivors are not dealers"):
        run.agree("north", "east", "north", "south", "stranger")
    with pytest.raises(PrivacyError, match="nothing is opened"):
        run.agree("north", "north", "south")


def test_signatures_on_different_survivors_open_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path).until_vectors()
    marks = {"east": run.agree("east"), "north": run.agree("north", "east", "north", "south")}
    with pytest.raises(PrivacyError, match="does not hold"):
        run.step("east", Masking.STEP_REVEAL, signatures=marks)
    with pytest.raises(PrivacyError, match="signatures on the survivors"):
        run.step("east", Masking.STEP_REVEAL, signatures={"east": marks["east"]})


def test_another_plan_than_the_others_were_told_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.keys()
    run.shares()
    with pytest.raises(PrivacyError, match="for another plan"):
        run.vector("east", task(seed=8))
    assert run.vector("east", task(previous_digest="ab", down_roles=["B"], counted_round=3)).array


def test_an_instance_of_another_round_task_or_kind_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for asked in (RoundPlan(run="r", round=2), RoundPlan(run="q", round=1)):
        run.asked = asked
        with pytest.raises(PrivacyError, match="is not of round"):
            run.keys("east")


def test_one_mask_hides_one_vector(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.keys()
    run.shares()
    first = run.vector("east")
    assert run.vector("east").array == first.array
    with pytest.raises(PrivacyError, match="one mask hides one vector"):
        run.vector("east", given=update("other"))


def test_unknown_counters_do_not_leave(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.keys()
    run.shares()
    odd = dataclasses.replace(update("east"), counters={"rows.seen": (1.0,)})
    with pytest.raises(PrivacyError, match=r"\['rows.seen'\] are not in the plan's vector"):
        run.vector("east", given=odd)


def test_keys_are_believed_as_first_seen_and_a_change_is_refused(tmp_path: Path) -> None:
    Run(tmp_path).until_vectors().open()
    known = json.loads((tmp_path / "east" / "peers.json").read_text())
    assert known == {name: Run(tmp_path).site(name).keys.public() for name in NAMES}
    (tmp_path / "west" / "identity").rename(tmp_path / "old")
    run = Run(tmp_path, RoundPlan(run="r", round=2))
    run.keys()
    with pytest.raises(PrivacyError, match="'west' cannot be believed"):
        run.shares("east")


def test_with_peers_listed_an_invented_site_is_refused(tmp_path: Path) -> None:
    pinned = {name: Run(tmp_path).site(name).keys.public() for name in NAMES if name != "west"}
    run = Run(tmp_path, pinned=pinned)
    run.keys()
    with pytest.raises(PrivacyError, match=r"'west' cannot be believed: its public key is not known.*\[peers\]"):
        run.shares("east")


def test_keys_of_strangers_and_twins_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.keys()
    bundles = [masking.bundle_message(bundle) for bundle in run.collector.bundles_for("east")]
    with pytest.raises(PrivacyError, match="two bundles"):
        run.step("east", Masking.STEP_SHARES, bundles=[*bundles, bundles[0]])
    bundles[3].site = "stranger"
    with pytest.raises(PrivacyError, match="who are no members"):
        run.step("east", Masking.STEP_SHARES, bundles=bundles)


def test_min_cohort_looks_at_the_sites_a_sum_is_opened_over(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="may be opened over 3 sites, allowed at least 4"):
        Run(tmp_path, least=4).keys("east")
    Run(tmp_path, nonce="2", least=3).keys("east")


def test_marks_survive_and_a_line_cut_by_a_crash_counts_for_nothing(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "log")
    marks.add({"a": "1", "b": "2"})
    marks.add({"a": "1"})
    with (tmp_path / "log").open("a") as file:
        file.write("\nc 3")
    again = Marks(tmp_path / "log")
    assert (again.clash({"a": "1", "c": "4"}), again.clash({"b": "3"})) == (None, "b")
    again.add({"d": "5"})
    assert Marks(tmp_path / "log").clash({"d": "6"}) == "d"


class TestWorker:
    """Through a real worker: the answer is kept in the clear on disk and leaves masked; policy looks at what really comes."""

    @pytest.fixture
    def ready(self, site, make_worker: Callable, plans, tmp_path: Path):
        site = site.model_copy(update={"name": "east", "policy": site.policy.model_copy(update={"require_secure_aggregation": True})})
        worker, plan = make_worker(site), plans.of(secure_aggregation=True)
        run = Run(tmp_path / "sites", plan=plan)
        run.site = lambda name: worker.secure if name == "east" else Secure(name, tmp_path / "sites" / name)
        run.keys()
        run.shares()
        return worker, run

    def ask(self, worker, run: Run, plans, **fields):
        plan = TaskPlan()
        plan.CopyFrom(run.plan)
        plan.masking.CopyFrom(Masking(name=run.collector.instance.name, **fields))
        reply = worker.handle(plans.message(plan))
        return plans.results(reply)["kinds"], reply

    def test_nothing_in_the_clear_leaves(self, ready, plans, site) -> None:
        worker, run = ready
        boxes = [masking.box_message(box) for box in run.collector.boxes_for("east")]
        result, reply = self.ask(worker, run, plans, step=Masking.STEP_VECTOR, boxes=boxes, dealers=run.collector.dealers)
        assert (result.weight, len(result.counters), result.reason) == (0, 0, "")
        kept = [Answer.from_bytes(path.read_bytes()[32:]) for path in (site.state / "answers").iterdir()]
        codes = answers.flat.unpack(kept[0].array)[1]
        masked = answers.flat.unpack(reply.arrays["kinds"])[1]
        assert kept[0].result.weight > 0
        assert np.mean(codes == masked[: codes.size]) < 0.01
        last = json.loads((site.state / "audit.jsonl").read_text().splitlines()[-1])
        assert last["masked"] == f"vector {run.collector.instance.name}"
        assert last["weight"] == 0

    def test_a_plan_without_masks_is_refused_whatever_it_says_of_itself(self, ready, plans) -> None:
        worker, _ = ready
        result = plans.results(worker.handle(plans.message(plans.of(secure_aggregation=True))))["kinds"]
        assert "require_secure_aggregation: asked without" in result.reason

    def test_a_broken_step_is_a_named_refusal(self, ready, plans) -> None:
        worker, run = ready
        result, reply = self.ask(worker, run, plans, step=Masking.STEP_VECTOR, dealers=run.collector.dealers)
        assert result.reason.startswith("secure aggregation r/1/kinds/train/")
        assert not reply.arrays
