"""A user's mistakes: one line on stderr that says what to do, the documented exit code, no traceback."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from fedpeft.cli.main import run
from fedpeft.errors import (
    AdapterError,
    BaseError,
    ConfigError,
    DataError,
    StorageError,
)

ROOT = Path(__file__).parents[3]
FEDERATION = ROOT / "deploy/configs/federation.toml"


@pytest.fixture
def site(tmp_path):
    """A site.toml over ``rows`` (written as JSON lines), with any base."""

    def write(rows: list[dict[str, str]], model: str = "minilm") -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "site.toml"
        path.write_text(
            f'name = "s"\ncoordinator = "127.0.0.1:1"\nstate = "s"\n[base]\nmodel = "{model}"\n[data.colour]\npath = "rows.jsonl"\n'
        )
        (tmp_path / "federation.toml").write_text(
            'name = "f"\n[base]\nmodel = "minilm"\n[tasks.colour]\nkind = "classification"\nlabels = ["red", "blue"]\n'
        )
        return path

    return write


def said(capsys, arguments: list[str], code: int) -> str:
    """Run, check the exit code and that every line is ours and none a traceback; returns stderr."""
    assert run(arguments) == code
    err = capsys.readouterr().err
    assert err.strip()
    assert "Traceback" not in err
    assert all(line.startswith("fedpeft: ") for line in err.splitlines())
    return err


def test_a_missing_federation_file(capsys):
    assert "no such file" in said(capsys, ["coordinator", "up", "absent.toml"], ConfigError.exit_code)


def test_malformed_toml(capsys, tmp_path):
    (tmp_path / "bad.toml").write_text("name = \n")
    assert "not valid TOML" in said(capsys, ["coordinator", "up", str(tmp_path / "bad.toml")], ConfigError.exit_code)


def test_every_fault_of_a_file_is_named_at_once(capsys, tmp_path):
    (tmp_path / "f.toml").write_text(
        'name = "F!"\nrouns = 3\n[method]\nkind = "lorra"\n[tasks.a]\nkind = "classification"\nlabels = ["x"]\n'
    )
    err = said(capsys, ["coordinator", "up", str(tmp_path / "f.toml")], ConfigError.exit_code)
    assert all(word in err for word in ("rouns", "lorra", "labels", "name"))


def test_an_unknown_label(capsys, site):
    path = site([{"text": f"sky {number}", "label": "green"} for number in range(30)])
    err = said(capsys, ["client", "dry-run", str(path), "--plan", str(path.parent / "federation.toml")], DataError.exit_code)
    assert "green" in err
    assert "red" in err


def test_empty_data(capsys, site):
    path = site([])
    err = said(capsys, ["client", "dry-run", str(path), "--plan", str(path.parent / "federation.toml")], DataError.exit_code)
    assert "rows.jsonl" in err


def test_a_base_that_is_not_there(capsys, site):
    path = site([{"text": "sky", "label": "blue"}], model="./no-such-model")
    assert "no-such-model" in said(
        capsys, ["client", "dry-run", str(path), "--plan", str(path.parent / "federation.toml")], BaseError.exit_code
    )


def test_no_registry(capsys, tmp_path):
    err = said(capsys, ["adapters", "list", "--registry", str(tmp_path / "none")], AdapterError.exit_code)
    assert "FEDPEFT_REGISTRY" in err


def test_an_unknown_schema(capsys):
    assert "federation" in said(capsys, ["schema", "nonsense"], ConfigError.exit_code)


@pytest.mark.parametrize("kind", ["federation", "site", "central"])
def test_schemas_are_printed_as_json(capsys, kind):
    assert run(["schema", kind]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]


def test_a_full_disk_is_a_storage_error(capsys, monkeypatch):
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")

    monkeypatch.setattr("fedpeft.cli.output.emit", full)
    err = said(capsys, ["schema", "site"], StorageError.exit_code)
    assert "no space left" in err
    assert "/data/x" in err


def test_a_defect_is_one_line_with_its_log(capsys, monkeypatch):
    monkeypatch.setattr("fedpeft.cli.output.emit", lambda *_arguments: 1 / 0)
    err = said(capsys, ["schema", "site"], 70)
    log = Path(err.split("traceback: ")[1].rstrip(")\n"))
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


def test_an_unknown_verb_is_a_usage_error(capsys):
    assert run(["trian"]) == 2
    assert "trian" in capsys.readouterr().err


FLAGS = {
    "adapters cluster": ["--how", "--identity", "--json", "--out", "--registry", "--set"],
    "adapters alias": ["--identity", "--registry"],
    "adapters convert": ["--base", "--identity", "--quantization", "--rank", "--registry"],
    "adapters export": ["--check", "--format", "--identity", "--registry", "--set"],
    "adapters history": ["--identity", "--registry"],
    "adapters list": ["--identity", "--json", "--registry"],
    "adapters merge": ["--how", "--identity", "--origin", "--out", "--registry", "--set"],
    "adapters pull": ["--from", "--identity", "--registry"],
    "adapters push": ["--identity", "--registry", "--to"],
    "adapters rollback": ["--identity", "--registry"],
    "adapters show": ["--identity", "--json", "--registry"],
    "adapters trust": ["--registry"],
    "adapters verify": ["--registry"],
    "adapters watch": ["--from-start", "--identity", "--json", "--registry"],
    "audit inversion": ["--json", "--per-update", "--roles", "--set", "--task"],
    "audit membership": ["--attack", "--json", "--set", "--stated", "--task"],
    "central estimate": ["--cpu-memory", "--gpu-memory", "--json", "--nodes", "--ranks", "--set"],
    "central export": ["--set"],
    "central rank": ["--from", "--set", "--verb"],
    "central resume": ["--from", "--hostfile", "--launcher", "--ranks", "--set"],
    "central train": ["--from", "--hostfile", "--launcher", "--print", "--ranks", "--set"],
    "central transfer": ["--hostfile", "--launcher", "--pairs", "--ranks", "--set"],
    "client audit": ["--json"],
    "client dry-run": ["--json", "--plan", "--round", "--set"],
    "client evaluate": ["--identity", "--json", "--registry", "--set"],
    "client identity": [],
    "client join": [],
    "client serve": ["--registry", "--set"],
    "client start": ["--fit", "--identity", "--json", "--plan", "--registry", "--task"],
    "combine": ["--json"],
    "combine show": [],
    "compare": ["--json", "--out", "--seeds", "--set"],
    "coordinator rounds": ["--json"],
    "coordinator serve": ["--config", "--set"],
    "coordinator status": ["--identity", "--json"],
    "coordinator up": ["--set"],
    "coordinator watch": ["--identity", "--json"],
    "certificates": ["--client", "--days", "--host", "--site", "--token"],
    "demo": ["--fresh", "--private", "--rounds"],
    "doctor": [],
    "evaluate": ["--identity", "--json", "--quantization", "--registry", "--routed", "--router"],
    "example": [],
    "init": ["--base", "--host", "--port", "--site", "--task"],
    "ledger forecast": ["--delta", "--json", "--ledger", "--rounds"],
    "ledger show": ["--delta", "--json", "--ledger"],
    "ledger verify": ["--head", "--ledger"],
    "methods": ["--base", "--family", "--json", "--scheme"],
    "methods show": ["--base", "--scheme"],
    "parity": ["--engine", "--fresh", "--json", "--out"],
    "parity-arm": ["--engine"],
    "route": ["--identity", "--json", "--quantization", "--registry", "--router", "--task"],
    "schema": [],
    "schemes": ["--json"],
    "schemes show": [],
}


def test_the_flag_set_is_frozen():
    import typer

    from fedpeft.cli.main import tree

    found: dict[str, list[str]] = {}

    def walk(command: object, path: str) -> None:
        children = getattr(command, "commands", {})
        options = [p.opts[0] for p in command.params if p.param_type_name == "option" and p.name != "help"]  # type: ignore[attr-defined]
        if path and (options or not children):
            found[path] = sorted(options)
        for name, child in children.items():
            walk(child, f"{path} {name}".strip())

    walk(typer.main.get_command(tree()), "")
    assert found == FLAGS


def test_sizes_for_people():
    from fedpeft.cli.output import size

    assert [size(n) for n in (0, 1023, 1536, 2_621_440, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "2.5 MiB", "5.0 GiB"]
