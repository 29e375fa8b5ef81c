"""The verbs that begin something, and what help shows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import get_args

import click
import pytest
import typer

from fedpeft.bases.spec import Quantization
from fedpeft.cli.main import run, tree
from fedpeft.config import parse
from fedpeft.errors import ConfigError
from fedpeft_client.config import SiteConfig, load_site
from fedpeft_coordinator.config import FederationConfig, load_federation


def test_what_init_writes_is_what_both_sides_read(tmp_path, capsys):
    folder = tmp_path / "clinics"
    sites = ["--site", "hospital-a", "--site", "hospital-b", "--host", "coordinator.example.org"]
    assert run(["init", str(folder), *sites, "--task", "triage=urgent, soon", "--task", "note"]) == 0
    assert "hospital-b.key" not in {path.name for path in (folder / "hospital-a").iterdir()}
    assert "triage.jsonl, note.jsonl" in capsys.readouterr().out
    federation = load_federation(folder / "coordinator/federation.toml")
    assert federation.link.node_auth
    assert {path.stem for path in federation.link.node_keys.glob("*.pub")} == {"hospital-a", "hospital-b"}
    assert not (folder / "coordinator/ca.key").exists()
    site = load_site(folder / "hospital-a/site.toml")
    assert site.coordinator == "coordinator.example.org:8000"
    assert set(site.data) == set(federation.tasks) == {"triage", "note"}
    assert federation.tasks["triage"].task.labels == ("urgent", "soon")
    assert site.auth.key.stat().st_mode & 0o077 == 0
    subprocess.run(
        [sys.executable, "-c", f"import ssl; ssl.create_default_context(cafile={str(site.tls.root_certificates)!r})"], check=True
    )


@pytest.mark.parametrize("host", [["--host", "coordinator.example.org"], []], ids=["guarded", "this machine"])
def test_a_site_that_is_added_is_as_those_that_were_there(tmp_path, capsys, host):
    folder, asked = tmp_path / "f", ["--task", "triage=urgent,soon", "--task", "note", "--port", "8123", *host]
    assert run(["init", str(folder), "--site", "a", *asked]) == 0
    assert run(["init", str(folder), "--site", "b", "--site", "c"]) == 0
    assert ("sites/c.pub: bring it to sites/" in capsys.readouterr().out) == bool(host)
    for name in "bc":
        assert (folder / name / "site.toml").read_text() == (folder / "a/site.toml").read_text().replace('"a', f'"{name}')
        assert {path.name.replace(name, "a", 1) for path in (folder / name).glob("*.key")} == {
            path.name for path in (folder / "a").glob("*.key")
        }
    assert {path.stem for path in (folder / "coordinator").glob("sites/*.pub")} == (set("abc") if host else set())
    load_site(folder / "c/site.toml")


@pytest.mark.parametrize(("sites", "needed"), [(1, 1), (3, 3), (4, 3), (5, 4), (9, 6)])
def test_one_of_many_sites_may_be_away(tmp_path, sites, needed):
    named = [part for number in range(sites) for part in ("--site", f"s{number}")]
    assert run(["init", str(tmp_path / "f"), *named, "--task", "t=x,y"]) == 0
    assert load_federation(tmp_path / "f/coordinator/federation.toml").cohort.min_sites == needed


def test_a_site_is_added_to_nothing_but_a_federation_of_ours(tmp_path, capsys):
    def refused(*sites: str) -> str:
        assert run(["init", str(tmp_path / "f"), *(part for site in sites for part in ("--site", site))]) == ConfigError.exit_code
        return capsys.readouterr().err

    assert "name the folder that `fedpeft init` wrote, or begin one with --task" in refused("b")
    assert run(["init", str(tmp_path / "f"), "--site", "a", "--task", "t=x,y", "--host", "h.example.org"]) == 0
    assert "f/a: exists; name another site" in refused("b", "a")
    assert "names ['B']" in refused("B")
    (tmp_path / "f/keys/ca.key").unlink()
    assert "holds no ca.key" in refused("b")
    (tmp_path / "f/coordinator/federation.toml").write_text("name = 3")
    assert "cannot be read (KeyError: 'tasks')" in refused("b")
    assert not (tmp_path / "f/b").exists()


def test_init_on_this_machine_needs_no_keys(tmp_path):
    assert run(["init", str(tmp_path / "small"), "--site", "a", "--task", "t=x,y"]) == 0
    assert load_federation(tmp_path / "small/coordinator/federation.toml").link.tls is None
    assert not (tmp_path / "small/keys").exists()
    assert f"# {', '.join(get_args(Quantization))}: the site's own choice" in (tmp_path / "small/a/site.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--site", "A_b", "--task", "t"], r"names \['A_b'\]"),
        (["--site", "keys", "--task", "t"], r"names \['keys'\]"),
        (["--site", "a", "--site", "a", "--task", "t"], "no two alike"),
        (["--site", "a", "--task", "t=one"], "--task t=one: write NAME=LABEL,LABEL"),
    ],
)
def test_init_refuses_names_that_the_files_could_not_hold(tmp_path, capsys, arguments, why):
    assert run(["init", str(tmp_path / "f"), *arguments]) == ConfigError.exit_code
    assert re.search(why, capsys.readouterr().err)
    assert not (tmp_path / "f").exists()


def test_certificates_are_added_but_never_overwritten(tmp_path, capsys):
    out = str(tmp_path / "keys")
    assert run(["certificates", out, "--site", "a"]) == ConfigError.exit_code
    assert "a new CA needs --host" in capsys.readouterr().err
    assert run(["certificates", out, "--host", "h", "--site", "a"]) == 0
    assert run(["certificates", out, "--client", "operator:ann"]) == 0
    assert capsys.readouterr().out.endswith("operator-ann.key\n" + str(tmp_path / "keys/operator-ann.pem") + "\n")
    assert run(["certificates", out, "--site", "a"]) == ConfigError.exit_code
    assert "is not overwritten" in capsys.readouterr().err
    assert run(["certificates", out, "--client", "boss:ann"]) == ConfigError.exit_code
    assert "write ROLE:NAME" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "model"), [("federation", FederationConfig), ("site", SiteConfig)])
def test_the_printed_example_is_valid(capsys, kind, model):
    import tomllib

    assert run(["example", kind]) == 0
    parse(tomllib.loads(capsys.readouterr().out), model, kind)
    assert run(["example", "other"]) == ConfigError.exit_code


def commands(group: click.Command, path: str = "fedpeft") -> Iterator[tuple[str, click.Command]]:
    yield path, group
    for name, command in sorted(getattr(group, "commands", {}).items()):
        if not command.hidden:
            yield from commands(command, f"{path} {name}")


def test_help_shows_every_word_of_it():
    """Rich takes [words] for markup and swallows them; click 8.5 drops the help of arguments."""
    for path, command in commands(typer.main.get_command(tree())):
        texts = [command.help or "", *(str(getattr(one, "help", "")) for one in command.params)]
        assert not re.findall(r"(?<!\\)\[[a-z][a-z_.]*\]", " ".join(texts)), path
        assert all(getattr(one, "help", "") for one in command.params), f"{path}: a parameter without help"


def test_the_doctor_says_what_a_missing_package_would_add(capsys, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from fedpeft.cli import inspection

    def version(package: str) -> str:
        if package == "deepspeed":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(inspection, "version", version)
    assert run(["doctor"]) == 0
    assert "missing: central jobs; pip install" in " ".join(capsys.readouterr().out.split())
