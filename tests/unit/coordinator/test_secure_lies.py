"""Masked sums where the coordinator or a site lies: nobody is opened, and who was lied to is a named drop-out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.unit.coordinator.masked import STEPS, bend, busy, masked, spoil

from fedpeft.errors import PrivacyError
from fedpeft.wire import Envelope, flat, masking
from fedpeft.wire.v1.federation_pb2 import RoundReply
from fedpeft_client.secure import Secure
from fedpeft_coordinator.setup import SecureAggregation


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

    def zero(reply: Envelope) -> Envelope:
        body = reply.open(RoundReply)
        for result in body.results:
            for name in list(result.masked.reveal.seeds):
                result.masked.reveal.seeds[name] = bytes(32)
        return Envelope.of("reply", body)

    spoil(federation, "east", "secure reveal", zero)
    row = federation.open(fault=busy({"west"}, "secure reveal")).run()[0].tasks["area"]
    assert row.outcome == "skipped"
    assert "tampered with" in row.reason


def test_fewer_than_three_test_sites_are_not_scored_by_name(fake: ModuleType, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=2)
    rows = federation.open(fault=busy({"west", "south"}, "evaluate")).run()[-1].tasks
    assert rows["area"].scores == {}
    assert "2 of 4 sites published keys, 3 are needed" in federation.named("unscored")[0]["tasks"]["area"]


def test_a_vector_of_another_size_and_garbage_are_named(fake: ModuleType, tmp_path: Path) -> None:
    federation = masked(fake, tmp_path, rounds=1)

    def short(reply: Envelope) -> Envelope:
        arrays = {name: flat.pack(flat.unpack(data)[0], flat.unpack(data)[1][:-1]) for name, data in reply.arrays.items()}
        return Envelope("reply", reply.body, arrays)

    spoil(federation, "east", "train vector", short)
    row = federation.open().run()[0].tasks["area"]
    assert "masked values, the plan needs" in row.drops["east"]
    assert row.outcome == "updated"
    with pytest.raises(PrivacyError):
        masking.work_of("a/b/c", "a", 1, "c")
