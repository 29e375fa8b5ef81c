"""site.toml: every fault at once, paths relative to the file, safe defaults; the shipped example loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.bases import BaseSpec
from fedpeft.errors import ConfigError
from fedpeft_client import supernode
from fedpeft_client.config import load_site

EXAMPLE = Path(__file__).parents[3] / "deploy" / "configs" / "site.toml"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(text)
    return path


def test_the_shipped_example_loads() -> None:
    site = load_site(EXAMPLE)
    assert site.name == "site-a"
    assert site.base.spec() == BaseSpec("minilm", "int8", max_tokens=128)
    assert site.allowed_tasks == {"topic", "urgency"}


def test_defaults_and_relative_paths(tmp_path: Path) -> None:
    for name in ("ca.crt", "key"):
        (tmp_path / name).write_text("x")
    path = write(
        tmp_path,
        'name = "s"\n[base]\nmodel = "./model"\n[tls]\nroot_certificates = "ca.crt"\n[auth]\nkey = "key"\n[data.t]\npath = "rows.jsonl"\n'
        '[data.u]\npath = "/abs/rows.csv"\n',
    )
    site = load_site(path, {"policy.max_rank": "8", "coordinator": "example.org:9"})
    assert site.state == tmp_path / "state"
    assert Path(site.base.model) == tmp_path / "model"
    assert site.tls.root_certificates == tmp_path / "ca.crt"
    assert (site.data["t"].path, site.data["u"].path) == (str(tmp_path / "rows.jsonl"), "/abs/rows.csv")
    assert (site.policy.max_rank, site.policy.max_epsilon, site.policy.tasks) == (8, None, ())
    assert site.coordinator == "example.org:9"
    assert site.allowed_tasks == {"t", "u"}


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'name = "No Spaces"\ncoordinator = "http://x"\ncolour = 1\n[policy]\nmax_rank = 0\nmax_rnak = 4\n[data.t]\npath = "a"\nhub = "b"\n',
    )
    with pytest.raises(ConfigError) as caught:
        load_site(path)
    text = str(caught.value)
    for part in (
        "name:",
        "host:port",
        "colour: unknown key",
        "policy.max_rank",
        "policy.max_rnak: unknown key",
        "data.t",
        "exactly one of",
    ):
        assert part in text
    assert len(text.splitlines()) == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "s"\n', "data: is required"),
        ('name = "s"\n[data]\n', "data:"),
        ('name = "s"\n[policy]\ntasks = ["u"]\n[data.t]\npath = "a"\n', "policy.tasks ['u'] have no rows"),
        ('name = "s"\n[auth]\nkey = "k"\n[data.t]\npath = "a"\n', "auth.key needs tls.root_certificates"),
        ('name = "s"\n[tls]\nroot_certificates = "none.crt"\n[data.t]\npath = "a"\n', "none.crt does not exist"),
        ('name = "s"\n[base]\nquantization = "int3"\n[data.t]\npath = "a"\n', "base.quantization"),
        ("name = ", "not valid TOML"),
    ],
)
def test_each_contradiction_is_explained(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_site(write(tmp_path, text))
    assert words in str(caught.value)


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_site(tmp_path / "absent.toml")


def test_supernode_arguments_follow_tls_and_key(tmp_path: Path) -> None:
    plain = supernode.arguments(load_site(EXAMPLE), 4000, tmp_path / "secret")
    assert plain[:2] == ["--superlink", "127.0.0.1:8000"]
    assert "--insecure" in plain
    for name in ("ca.crt", "key"):
        (tmp_path / name).write_text("x")
    text = 'name = "s"\n[tls]\nroot_certificates = "ca.crt"\n[auth]\nkey = "key"\n[data.t]\npath = "r"\n'
    safe = supernode.arguments(load_site(write(tmp_path, text)), 4000, tmp_path / "secret")
    assert "--insecure" not in safe
    assert safe[-4:] == ["--root-certificates", str(tmp_path / "ca.crt"), "--auth-supernode-private-key", str(tmp_path / "key")]
