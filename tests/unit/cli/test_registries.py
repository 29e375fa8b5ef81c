"""Without --registry a verb finds the registry of the federation whose folder it is called in, or says where it looked."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.cli.main import run
from fedpeft.control.place import beside, look

VERBS = (["adapters", "list"], ["adapters", "verify"], ["adapters", "trust", "0" * 64])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDPEFT_REGISTRY", raising=False)
    return tmp_path


def test_where_there_is_none_one_line_says_what_was_looked_for_and_what_names_it(folder, capsys):
    (folder / "federation.toml").write_text('state = "away"')
    for verb in VERBS:
        assert run(verb) == 6
        (said,) = capsys.readouterr().err.splitlines()
        assert "neither registry nor away/registry is there; give --registry FOLDER or grpc://HOST:PORT, or set FEDPEFT_REGISTRY" in said
    assert beside(folder) == str(folder / "registry")


@pytest.mark.parametrize(
    ("file", "text", "place"),
    [
        ("federation.toml", "", "state/registry"),
        ("federation.toml", 'state = "away"', "away/registry"),
        ("federation.toml", 'state = "away"\nregistry = "kept"', "kept"),
        ("coordinator/federation.toml", 'state = "state"', "coordinator/state/registry"),
        ("job.toml", "", "registry"),
    ],
)
def test_the_federations_own_is_found(folder, capsys, file, text, place):
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(text)
    (folder / place).mkdir(parents=True)
    assert look(folder) == folder / place
    assert run(VERBS[2]) == 0
    assert capsys.readouterr().out.startswith(f"{place}: versions signed by")
    assert (folder / place / "keys").is_dir()
    assert run(VERBS[0]) == 0
    assert beside(folder) == str(folder / place)


@pytest.mark.parametrize(
    ("file", "state", "place"),
    [("site.toml", "own", "own/ledger"), ("coordinator/federation.toml", "state", "coordinator/state/ledger"), ("x.toml", "", "ledger")],
)
def test_the_ledger_here_is_found_too(folder, capsys, file, state, place):
    (folder / "federation.toml").write_text("")  # a site has a copy of it
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(f'state = "{state}"')
    (folder / place).mkdir(parents=True)
    assert run(["ledger", "verify"]) == 9
    assert capsys.readouterr().err.startswith(f"fedpeft: {place}: no ledger there; give --ledger")
