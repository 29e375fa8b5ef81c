"""dry-run: what it prints is what the worker then sends, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedpeft.errors import ConfigError, DataError
from fedpeft.schemes import SCHEMES
from fedpeft.update import TRAIN_COUNTERS
from fedpeft_client.cli import app
from fedpeft_client.config import SiteConfig, load_site
from fedpeft_client.dry_run import as_json, forecast, read_plan

FEDERATION = """
name = "f"
rounds = 5
[base]
model = "minilm"
[method]
kind = "lora"
r = 4
[scheme]
kind = "alternating"
[training]
steps = 2
batch_size = 2
[server]
kind = "adam"
[cohort]
min_sites = 3
[secure_aggregation]
enabled = false
[link]
port = 8000
[tasks.kinds]
kind = "classification"
labels = ["animal", "tool"]
training = { steps = 3 }
[tasks.elsewhere]
kind = "classification"
labels = ["a", "b"]
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(FEDERATION)
    return path


def test_the_forecast_is_what_the_worker_sends(site: SiteConfig, plan: Path, make_worker, plans) -> None:
    (one,) = forecast(site, read_plan(plan), 1)
    reply = make_worker(site).handle(plans.message(plans.of("kinds")))
    sent = plans.results(reply)["kinds"]
    layout = plans.spec().layout.subset({"B", "head"})
    assert [(line.name, line.role, line.shape, line.bytes) for line in one.tensors] == [
        (entry.name, entry.role, entry.shape, 4 * entry.size) for entry in layout.entries
    ]
    assert {name: len(values.values) for name, values in sent.counters.items()} == {
        name: count for name, count in one.counters.items() if name.startswith("train.")
    }
    assert len(reply.arrays["kinds"]) + 8 * sum(len(values.values) for values in sent.counters.values()) == one.bytes
    assert (one.task, one.phase, one.examples, one.epsilon, one.refused) == ("kinds", "B", 12, "none: not accounted", None)
    assert set(one.rules) >= {"tasks", "max_upload_mb", "min_cohort", "max_epsilon"}


def test_another_round_sends_the_other_factor(site: SiteConfig, plan: Path) -> None:
    (one,) = forecast(site, read_plan(plan), 2)
    assert {line.role for line in one.tensors} == {"A", "head"}


def test_a_refused_task_says_why(site: SiteConfig, plan: Path) -> None:
    strict = site.model_copy(update={"policy": site.policy.model_copy(update={"max_rank": 2, "max_steps": 2})})
    (one,) = forecast(strict, read_plan(plan))
    assert one.refused is not None
    assert "max_rank: asked 4, allowed at most 2" in one.refused
    assert "max_steps: asked 3" in one.refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('kind = "lora"', 'kind = "loar"'), "unknown kind 'loar'"),
        (("r = 4", "rank = 4"), "unknown keys"),
        (("training = { steps = 3 }", "training = { steps = 0 }"), "training.steps"),
        (('labels = ["animal", "tool"]', "labels = []"), "labels"),
        (("[tasks.kinds]", "[tasks.other]"), "nothing in common"),
    ],
)
def test_faults_of_the_federations_file_are_explained(site: SiteConfig, plan: Path, change: tuple[str, str], words: str) -> None:
    plan.write_text(FEDERATION.replace(*change))
    with pytest.raises(ConfigError) as caught:
        forecast(site, read_plan(plan))
    assert words in str(caught.value)


def test_the_verb_prints_tables_and_json(site_file: Path, plan: Path) -> None:
    shown = CliRunner().invoke(app, ["dry-run", str(site_file), "--plan", str(plan)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "lora_B" in shown.output
    assert "none: not accounted" in shown.output
    refused = CliRunner().invoke(app, ["dry-run", str(site_file), "--plan", str(plan), "--set", "policy.max_rank=2"])
    assert "REFUSED, nothing leaves" in refused.output
    parsed = CliRunner().invoke(app, ["dry-run", str(site_file), "--plan", str(plan), "--json"])
    (one,) = json.loads(parsed.output)
    assert one["tensors"][0]["bytes"] > 0
    assert load_site(site_file).policy.max_rank == 256


@pytest.mark.parametrize("kind", ["fedsa", "scaffold", "slots"])
def test_what_a_scheme_adds_and_keeps_is_forecast(site: SiteConfig, plan: Path, make_worker, plans, kind: str) -> None:
    plan.write_text(FEDERATION.replace('kind = "alternating"', f'kind = "{kind}"'))
    small = site.model_copy(update={"policy": site.policy.model_copy(update={"max_rank": 2 if kind == "slots" else 4})})
    (one,) = forecast(small, read_plan(plan), 1)
    scheme, layout = SCHEMES[kind](), plans.spec().layout
    up = scheme.travels(layout, scheme.phase(1, layout))
    assert one.refused is None
    assert [(line.name, line.bytes) for line in one.tensors] == [(entry.name, 4 * entry.size) for entry in up.entries]
    assert one.private == (("B", "head") if kind == "fedsa" else ())
    if one.private:
        shown = CliRunner().invoke(app, ["dry-run", str(site.state.parent / "site.toml"), "--plan", str(plan)])
        assert "roles B, head: trained here, never sent" in shown.output


def test_a_setting_without_a_value_is_explained(site_file: Path, plan: Path) -> None:
    result = CliRunner().invoke(app, ["dry-run", str(site_file), "--plan", str(plan), "--set", "policy"])
    assert isinstance(result.exception, ConfigError)


def test_a_row_that_does_not_fit_is_named_with_its_table_and_file(plan: Path, site: SiteConfig) -> None:
    path = Path(str(site.data["kinds"].path))
    path.write_text('{"message": "x", "label": "tool", "split": "train"}\n')
    with pytest.raises(DataError, match=rf"\[data.kinds\], {path}, split train: row 1: no field 'text'.*columns = "):
        forecast(site, read_plan(plan))
    path.write_text('{"text": "x", "label": "tool", "split": "train"}\n')
    assert forecast(site, read_plan(plan))[0].tested == 0


def test_the_verbs_are_the_documented_ones() -> None:
    assert sorted(str(command.name or command.callback.__name__) for command in app.registered_commands) == [
        "audit",
        "dry-run",
        "evaluate",
        "identity",
        "join",
        "serve",
        "start",
    ]


@pytest.mark.parametrize(("line", "masked"), [("", True), ("enabled = false", False)])
def test_whether_sums_are_masked_is_said_and_judged(site: SiteConfig, plan: Path, line: str, masked: bool) -> None:
    plan.write_text(FEDERATION.replace("enabled = false", line))
    demanding = site.model_copy(update={"policy": site.policy.model_copy(update={"require_secure_aggregation": True})})
    (one,) = forecast(demanding, read_plan(plan), 1)
    assert one.masked is masked
    assert (one.refused is None) is masked
    said = CliRunner().invoke(app, ["dry-run", str(site.state.parent / "site.toml"), "--plan", str(plan)]).output
    assert ("masks    on" in said) is masked
    assert set(one.routing) == set(one.counters) - set(TRAIN_COUNTERS)
    assert one.routing_bytes == sum(one.routing.values()) * (16 if masked else 8) > 0  # of four words of 32 bits, or a double
    assert as_json([one])[0]["routing_bytes"] == one.routing_bytes


@pytest.mark.parametrize(("least", "refused"), [(4, False), (5, True)])
def test_a_rule_over_groups_is_judged_by_the_sites_of_a_group(site: SiteConfig, plan: Path, least: int, refused: bool) -> None:
    text = FEDERATION.replace("min_sites = 3", "min_sites = 15").replace("enabled = false", "")
    plan.write_text(text.replace("[cohort]", '[combine]\nkind = "buckets"\nsize = 5\n[cohort]'))
    wary = site.model_copy(update={"policy": site.policy.model_copy(update={"min_cohort": least})})
    (one,) = forecast(wary, read_plan(plan), 1)
    assert (one.refused is not None) is refused
    assert not refused or "asked a cohort of 4, allowed at least 5" in one.refused


def test_the_identity_is_a_line_for_other_sites(site: SiteConfig) -> None:
    from fedpeft_client.secure import Secure

    said = CliRunner().invoke(app, ["identity", str(site.state.parent / "site.toml")]).output
    assert said == f'site-a = "{Secure("site-a", site.state).keys.public()}"\n'
