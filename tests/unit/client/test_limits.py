"""When a site works, how much may leave in a day, and what its own record says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedpeft.errors import ConfigError, PolicyError
from fedpeft_client import audit
from fedpeft_client.cli import app
from fedpeft_client.config import Policy, SiteConfig, load_site
from fedpeft_client.policy import Ask, RestingError, check, today


@pytest.fixture
def site(tmp_path: Path) -> SiteConfig:
    (tmp_path / "site.toml").write_text('name = "s"\n[data.t]\npath = "rows.jsonl"\n')
    return load_site(tmp_path / "site.toml")


def asked(at: str, sent: int = 0) -> Ask:
    return Ask("t", ("b",), "lora", 8, 1_000_000, 3, 10, at=time.fromisoformat(at), sent_today=sent)


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [("09:00-17:30", ("09:00", "17:29"), ("08:59", "17:30")), ("19:00-07:00", ("19:00", "23:59", "06:59"), ("07:00", "12:00"))],
)
def test_a_site_works_in_its_hours_alone(site, hours, inside, outside):
    limited = site.model_copy(update={"policy": Policy(hours=hours)})
    for at in inside:
        assert "hours" in check(asked(at), limited)
    for at in outside:
        with pytest.raises(PolicyError, match=f"hours: asked at {at}, allowed {hours}"):
            check(asked(at), limited)


@pytest.mark.parametrize(
    ("limits", "at", "seconds"),
    [
        ({"hours": "19:00-07:00"}, "07:00", 12 * 3600),
        ({"hours": "19:00-07:00"}, "18:59:30", 30),
        ({"hours": "09:00-17:30"}, "17:30", 15 * 3600 + 1800),
        ({"max_upload_mb_per_day": 0.5}, "12:00", 7),
        ({"hours": "12:01-13:00", "max_upload_mb_per_day": 0.5}, "12:00", 60),
    ],
)
def test_what_is_only_too_early_says_when_it_is_not(site, limits, at, seconds):
    limited = site.model_copy(update={"policy": Policy(**limits)})
    with pytest.raises(RestingError, match="policy of s lets task 't' wait: ") as early:
        check(replace(asked(at), day_left=7), limited)
    assert early.value.seconds == seconds
    with pytest.raises(PolicyError, match="refuses task 't'") as never:
        check(asked(at), site.model_copy(update={"policy": Policy(max_rank=1, **limits)}))
    assert not isinstance(never.value, RestingError)


def test_hours_that_are_none_are_refused(tmp_path):
    (tmp_path / "site.toml").write_text('name = "s"\n[policy]\nhours = "9-17"\n[data.t]\npath = "rows.jsonl"\n')
    with pytest.raises(ConfigError, match=r"policy.hours: .*HH:MM-HH:MM.*got '9-17'"):
        load_site(tmp_path / "site.toml")


def test_a_day_has_so_many_bytes(site):
    limited = site.model_copy(update={"policy": Policy(max_upload_mb_per_day=3.0)})
    check(asked("12:00", 2_000_000), limited)
    with pytest.raises(PolicyError, match=r"max_upload_mb_per_day: asked, with what left today, 3.000 MB, allowed at most 3 MB|3.001"):
        check(asked("12:00", 2_000_001), limited)


def test_what_left_is_counted_from_the_sites_own_record(site):
    path = site.state / "audit.jsonl"
    audit.record(path, audit.Departure("f", 1, "train", "t", "ok", {"B": 70}, ("train.loss",), bytes=100))
    audit.record(path, audit.Departure("f", 2, "train", "t", "refused: policy", bytes=10))
    with path.open("a") as file:
        file.write(json.dumps({"time": "2001-01-01T00:00:00", "bytes": 5, "tensors": {"B": 5}}) + '\n{"torn')
    assert [one.get("round") for one in audit.read(path)] == [1, 2, None]
    assert audit.sent_today(path, datetime.now(UTC).date()) == 110
    limited = site.model_copy(update={"policy": Policy(max_upload_mb_per_day=1.0)})
    assert (today(limited)["sent_today"], today(site)["sent_today"]) == (110, 0)


def test_the_record_is_printed_for_people(site, tmp_path):
    audit.record(site.state / "audit.jsonl", audit.Departure("f", 1, "train", "t", "ok", {"B": 70}, ("train.loss",), bytes=2048))
    said = CliRunner().invoke(app, ["audit", str(tmp_path / "site.toml")])
    assert said.exit_code == 0
    assert "f 1" in said.output
    assert "values of B; 1 counters" in said.output
    assert "1 answers, 2.0 KiB in all" in said.output
    whole = CliRunner().invoke(app, ["audit", str(tmp_path / "site.toml"), "--json"])
    assert json.loads(whole.output)[0]["bytes"] == 2048
