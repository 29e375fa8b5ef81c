"""federation.toml: the shipped example loads, faults are named, clashes name both settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedpeft import config
from fedpeft.config import describe
from fedpeft.errors import ConfigError
from fedpeft.tensors import Entry, Layout
from fedpeft_coordinator.build import facts, renewed, secure
from fedpeft_coordinator.config import FederationConfig, load_federation
from fedpeft_coordinator.fitting import check_fit

EXAMPLE = Path(__file__).parents[3] / "deploy" / "configs" / "federation.toml"
MINIMAL = {"name": "f", "tasks": {"t": {"kind": "classification", "labels": ["a", "b"]}}}


def load(**changes: object) -> FederationConfig:
    return config.parse({**MINIMAL, **changes}, FederationConfig, "f.toml")


def test_the_example_loads() -> None:
    federation = load_federation(EXAMPLE)
    assert federation.tasks["urgency"].task.labels == ("low", "normal", "high")
    assert federation.tasks["urgency"].task.name == "urgency"
    assert (federation.settings("topic").steps, federation.settings("urgency").steps) == (20, 10)
    assert federation.settings("urgency").lr == federation.training.lr
    assert federation.state == EXAMPLE.parent / "federation-state"
    assert federation.registry_folder == federation.state / "registry"


def test_defaults() -> None:
    federation = load()
    assert type(federation.scheme).kind == "alternating"
    assert type(federation.server).kind == "sgd"
    assert type(federation.method).kind == "lora"
    assert federation.cohort.expected == 1


@pytest.mark.parametrize(("sites", "enabled", "on"), [(2, "auto", False), (3, "auto", True), (3, False, False), (3, True, True)])
def test_masks_are_on_from_three_sites_unless_a_line_says_otherwise(sites: int, enabled: object, on: bool) -> None:
    federation = load(cohort={"min_sites": sites}, secure_aggregation={"enabled": enabled})
    assert federation.masks is on
    assert (secure(federation) is not None) is on
    assert not on or secure(federation).least == sites


@pytest.mark.parametrize(("size", "least", "opened"), [(5, None, 4), (3, None, 3), (20, None, 16), (5, 3, 3)])
def test_a_group_is_opened_without_those_that_may_vanish(size: int, least: int | None, opened: int) -> None:
    table = {} if least is None else {"least": least}
    federation = load(combine={"kind": "buckets", "size": size}, cohort={"min_sites": 60}, secure_aggregation=table)
    assert secure(federation).grouped == opened


def test_masks_are_turned_off_on_the_command_line() -> None:
    assert not load_federation(EXAMPLE, {"cohort.min_sites": "3", "secure_aggregation.enabled": "false"}).masks
    assert load_federation(EXAMPLE, {"cohort.min_sites": "3"}).masks


def test_overrides_of_the_command_line() -> None:
    federation = load_federation(EXAMPLE, {"cohort.deadline": "5", "scheme.kind": "fedavg"})
    assert federation.cohort.deadline == 5.0
    assert type(federation.scheme).kind == "fedavg"


TWO = {name: {"kind": "classification", "labels": ["a", "b"]} for name in ("t", "u")}
CLASHES: dict[str, tuple[dict[str, object], str]] = {
    "quorum": ({"cohort": {"min_sites": 3, "wait_for_sites": 2}}, r"cohort\.wait_for_sites = 2 .* cohort\.min_sites = 3"),
    "auth": ({"link": {"node_auth": True}}, r"link\.node_auth = true needs \[link\.tls\]"),
    "open": ({"link": {"host": "0.0.0.0"}}, r"link\.host = '0\.0\.0\.0' .* \[link\.tls\] is missing"),
    "warmup": ({"training": {"steps": 5, "warmup": 5}}, r"training\.warmup = 5 and training\.steps = 5"),
    "prefix": (
        {"method": {"kind": "prefix"}, "training": {"checkpoint_activations": True}},
        r"method\.kind = 'prefix.*training\.checkpoint_activations",
    ),
    "unknown kind": ({"scheme": {"kind": "fedprox"}}, r"scheme: unknown kind 'fedprox'; known kinds are"),
    "unknown key": ({"round": 3}, r"round: unknown key; known keys are"),
    "unknown training key": ({"tasks": {"t": {**MINIMAL["tasks"]["t"], "training": {"step": 3}}}}, r"unknown keys \['step'\]"),
    "task": ({"tasks": {"t": {"kind": "classification", "label": ["a"]}}}, r"labels"),
    "no task": ({"tasks": {}}, r"tasks"),
    "bad name": ({"name": "No Spaces"}, r"name"),
    "gathers": (
        {"scheme": "flexlora", "combine": "krum", "cohort": {"min_sites": 9}},
        r"combine\.kind = 'krum' and scheme\.kind = 'flexlora': .*set combine = 'sum'",
    ),
    "two sites under masks": (
        {"cohort": {"min_sites": 2}, "secure_aggregation": {"enabled": True}},
        r"secure_aggregation\.enabled = true and cohort\.min_sites = 2: below 3",
    ),
    "masked gathering": (
        {"scheme": "flexlora", "cohort": {"min_sites": 3}},
        r"scheme\.kind = 'flexlora' and secure aggregation .*enabled = false",
    ),
    "masked rule": (
        {"combine": "median", "cohort": {"min_sites": 3}},
        r"combine\.kind = 'median' and secure aggregation .*set combine\.kind = 'buckets'.*enabled = false",
    ),
    "small groups": (
        {"combine": {"kind": "buckets", "size": 2}, "cohort": {"min_sites": 6}},
        r"combine\.size = 2 and secure_aggregation\.least = 3: no group's sum",
    ),
    "hidden groups": (
        {"combine": {"kind": "buckets", "size": 4}, "cohort": {"min_sites": 12}, "secure_aggregation": {"least": 5}},
        r"combine\.size = 4 and secure_aggregation\.least = 5: no group's sum",
    ),
    "hidden holdings without masks": (
        {"cohort": {"min_sites": 2}, "secure_aggregation": {"task_blind": True}, "max_examples": 10},
        r"task_blind = true hides .* needs cohort\.min_sites = 3 or more",
    ),
    "hidden holdings and no weight of reference": (
        {"cohort": {"min_sites": 3}, "secure_aggregation": {"task_blind": True}},
        r"task_blind = true and no max_examples",
    ),
    "hidden holdings and noise over sites": (
        {
            "cohort": {"min_sites": 3},
            "secure_aggregation": {"task_blind": True},
            "max_examples": 10,
            "privacy": {"kind": "distributed", "epsilon": 8.0},
        },
        r"task_blind = true and privacy\.kind = 'distributed'",
    ),
    "no quorum": (
        {"cohort": {"min_sites": 3}, "secure_aggregation": {"colluding": 0.5, "dropping": 0.3}},
        r"colluding = 0\.5 and dropping = 0\.3 leave no quorum",
    ),
    "least": ({"combine": {"kind": "krum", "f": 2}}, r"combine\.kind = 'krum' needs 7 sites .* cohort\.min_sites = 1.*to 7 or more"),
    "root": ({"combine": "fltrust", "cohort": {"min_sites": 2}}, r"combine\.kind = 'fltrust' needs cohort\.root"),
    "idle root": ({"cohort": {"root": "a"}}, r"cohort\.root = 'a' has no use without combine\.kind = 'fltrust'"),
    "no samples": ({"start": "eva"}, r"start\.kind = 'eva' needs start\.data"),
    "idle samples": ({"start": {"kind": "pissa", "data": "x.jsonl"}}, r"start\.kind = 'pissa' and start\.data: .*leave start\.data out"),
    "unknown start": ({"start": "svd"}, r"start: unknown kind 'svd'"),
    "silent positions": ({"method": "alora"}, r"method: 'alora' is not offered: it needs the positions .*use lora"),
    "silent method": ({"method": {"kind": "kasa", "r": 4}}, r"method: 'kasa' is not offered: it rewrites the base"),
    "shared pairs": (
        {"sharing": {"share": "B"}, "scheme": "fedavg"},
        r"sharing\.share = 'B' with scheme\.kind = 'fedavg': .*'alternating'",
    ),
    "nobody to share with": ({"sharing": {}}, r"\[sharing\] needs two tasks or more"),
    "a start of its own": (
        {"sharing": {}, "tasks": TWO, "start": {"kind": "eva", "data": "x.jsonl"}},
        r"\[sharing\] and start\.kind = 'eva': .*pissa or olora",
    ),
    "no report": ({"sharing": {"split_after": 2}, "tasks": TWO}, r"split_after = 2 and evaluate_every = 0: .*report = true"),
    "unknown sharing": ({"sharing": {"shares": "A"}, "tasks": TWO}, r"sharing\.shares: Unexpected"),
    "one cluster": ({"tasks": {"t": {**TWO["t"], "clusters": 1}}}, r"tasks\.t\.clusters: is 1; needs a whole number from 2"),
    "a choice without noise": (
        {"tasks": {"t": {**TWO["t"], "clusters": 2}}, "privacy": {"kind": "example", "epsilon": 3.0}},
        r"privacy\.kind = 'example' and clusters .*leave clusters out",
    ),
    "a cluster's name": (
        {"tasks": {"t": {**TWO["t"], "clusters": 2}, "t.1": TWO["t"]}},
        r"tasks: \['t\.1'\] are there twice",
    ),
    "momentum": ({"training": {"momentum": 0.9}}, r"training\.momentum = 0\.9 and training\.optimizer = 'adamw'"),
    "learning rate": ({"training": {"lr": -1}}, r"lr"),
}


@pytest.mark.parametrize("case", CLASHES)
def test_clashes_name_both_settings(case: str) -> None:
    changes, pattern = CLASHES[case]
    with pytest.raises(ConfigError) as caught:
        load(**changes)
    assert re.search(pattern, str(caught.value)), str(caught.value)


LORA = Layout.of([Entry("A", "x.lora_A.weight", (2, 5)), Entry("B", "x.lora_B.weight", (5, 2)), Entry("head", "c", (3,))])
IA3 = Layout.of([Entry("scale", "x.ia3_l", (5,))])
MISFITS: dict[str, tuple[dict[str, object], Layout, str]] = {
    "no factors": (
        {"scheme": "fedsa", "method": "ia3"},
        IA3,
        r"scheme\.kind = 'fedsa' and method\.kind = 'ia3': .*set method\.kind = \"lora\"",
    ),
    "no fold": ({"scheme": "fedex"}, LORA, r"scheme\.kind = 'fedex' and method\.kind = 'lora': .*method\.extra"),
    "no factors to share": (
        {"sharing": {}, "method": "ia3", "tasks": TWO},
        IA3,
        r"sharing\.share = 'A' and method\.kind = 'ia3': .*take lora",
    ),
    "products": ({"scheme": "fedavg", "combine": "median"}, LORA, r"combine\.kind = 'median' and scheme\.kind = 'fedavg': .*multiply"),
    "masses": ({"scheme": "slots", "combine": "median"}, LORA, r"combine\.kind = 'median' and scheme\.kind = 'slots': .*\['mass'\]"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_the_adapter_names_both_settings(case: str) -> None:
    changes, layout, pattern = MISFITS[case]
    with pytest.raises(ConfigError) as caught:
        check_fit(load(**{"cohort": {"min_sites": 3}, "secure_aggregation": {"enabled": False}, **changes}), layout)
    assert re.search(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    "changes", [{}, {"combine": "sum"}, {"combine": "median"}, {"scheme": "fedavg", "combine": "rfa"}, {"scheme": "flexlora"}]
)
def test_what_fits_passes(changes: dict[str, object]) -> None:
    check_fit(load(**{"cohort": {"min_sites": 3}, "secure_aggregation": {"enabled": False}, **changes}), LORA)


def test_a_start_in_all_its_forms(tmp_path: Path) -> None:
    assert load(start="pissa").start.how.kind == "pissa"
    assert load(start={"kind": "corda", "mode": "preserve", "data": {"path": "x.jsonl", "limit": 9}}).start.data.limit == 9
    file = tmp_path / "f.toml"
    file.write_text('name = "f"\nstart = { kind = "eva", data = "rows.jsonl" }\n[tasks.t]\nkind = "classification"\nlabels = ["a", "b"]\n')
    assert load_federation(file).start.data.path == str(tmp_path / "rows.jsonl")


def test_a_base_that_looks_like_a_path_is_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    for model, read in [("./enc", str(tmp_path / "enc")), ("../enc", str(tmp_path / "../enc")), ("/enc", "/enc"), ("org/enc", "org/enc")]:
        file.write_text(f'name = "f"\n[base]\nmodel = "{model}"\n[tasks.t]\nkind = "classification"\nlabels = ["a", "b"]\n')
        assert load_federation(file).base.model == read


def test_clusters_are_tasks_with_one_set_of_rows() -> None:
    found = load(tasks={"t": {**TWO["t"], "clusters": 3, "training": {"steps": 3}}, "u": TWO["u"]})
    assert sorted(found.tasks) == ["t.0", "t.1", "t.2", "u"]
    assert {entry.task.name for entry in found.tasks.values()} == {"t", "u"}
    assert found.settings("t.2").steps == 3


def test_a_task_may_have_a_start_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    task = 'kind = "classification"\nlabels = ["a", "b"]\n'
    file.write_text(
        f'name = "f"\nstart = "pissa"\n[tasks.t]\n{task}[tasks.u]\n{task}start = {{ kind = "mixture", adapters = {{ "old/t" = 0.5 }} }}\n'
    )
    found = load_federation(file)
    assert found.start_of("t").how.kind == "pissa"
    assert dict(found.start_of("u").how.adapters) == {str(tmp_path / "old/t"): 0.5}
    assert facts(found, "base", {})["starts"]["u"]["kind"] == "mixture"


def test_facts_of_an_earlier_version_get_the_defaults_it_did_not_know() -> None:
    now = facts(load(), "base", {"t": describe(load().tasks["t"].task)})
    before = json.loads(json.dumps(now))
    del before["method"]["extra"], before["method"]["dropout"], before["server"]["lr"], before["tasks"]["t"]["text"]
    assert before != now
    assert renewed(before) == now
    before["method"]["r"] = 3
    assert renewed(before) != now
    before["method"]["kind"] = "gone"
    assert renewed(before)["method"]["kind"] == "gone"


def test_every_fault_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load(rounds=0, seed=-1, cohort={"deadline": 0})
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["seed", "rounds", "cohort.deadline"]


def test_missing_certificates_are_named(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text('name = "f"\n[tasks.t]\nkind = "classification"\nlabels = ["a", "b"]\n[link.tls]\nca = "a"\ncert = "b"\nkey = "c"\n')
    with pytest.raises(ConfigError, match=r"link\.tls\.ca: .*/a does not exist; `fedpeft certificates` makes the files"):
        load_federation(file)


def test_the_schema_is_json() -> None:
    assert "cohort" in json.dumps(FederationConfig.model_json_schema())
