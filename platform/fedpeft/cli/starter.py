"""What `fedpeft init` writes: one folder for the coordinator's machine and one for each site's, wired to one another."""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from fedpeft.bases.spec import Quantization
from fedpeft.config import NAME
from fedpeft.control.address import loopback
from fedpeft.errors import ConfigError
from fedpeft.issuing import issue

TAKEN = {"coordinator", "keys"}
FEDERATION = """\
# One federation; start it with: fedpeft coordinator up federation.toml
# Paths are relative to this file. `fedpeft example federation` explains every key.
name = "{name}"
rounds = 10
state = "state"                  # journal, adapters, registry; back it up
evaluate_every = 5               # score the adapters on the sites' held-out rows

[base]
model = "{base}"                 # an alias, a Hugging Face id, or a folder (starting with . or ~ or /); the sites need the same

[method]
kind = "lora"                    # `fedpeft methods` lists them

[scheme]
kind = "alternating"             # averages LoRA exactly at half the bytes; `fedpeft schemes` lists them

[training]
steps = 20                       # of each site in each round

[cohort]
min_sites = {sites}                    # from 3 on the coordinator sees masked sums alone, never one site's part
{tasks}
[link]
host = "{listen}"
port = {port}
{guard}"""
TASK = """
[tasks.{name}]
kind = "classification"
labels = [{labels}]
"""
TEXT = """
[tasks.{name}]
kind = "generation"
"""
GUARD = """\
node_auth = true                 # only sites whose key lies in node_keys
node_keys = "sites"
tls = { ca = "ca.crt", cert = "server.pem", key = "server.key" }
"""
SITE = """\
# One site. See first what would leave: fedpeft client dry-run site.toml --plan federation.toml
# then join, and stay: fedpeft client join site.toml. `fedpeft example site` explains every key.
name = "{name}"
coordinator = "{host}:{port}"
state = "state"

[base]
model = "{base}"
quantization = "none"            # {quantizations}: the site's own choice
{guard}{tasks}
[policy]                         # a plan that asks for more is refused, with the reason
max_upload_mb = 64
"""
KEYS = """
[tls]
root_certificates = "ca.crt"
[auth]
key = "{name}.key"
"""
ROWS = """
[data.{name}]
path = "{name}.jsonl" # JSONL, JSON, CSV or Parquet; columns = {{ message = "{first}" }} where yours has another name
"""


@dataclass(frozen=True)
class Starter:
    """What is asked for: tasks with their labels (none: text is generated), and the host by which sites reach the coordinator."""

    name: str
    sites: tuple[str, ...]
    tasks: Mapping[str, tuple[str, ...]]
    host: str
    port: int
    base: str

    def check(self) -> None:
        """Raise `ConfigError` when a name cannot be one, or is there twice."""
        names = [self.name, *self.sites, *self.tasks]
        wrong = [name for name in names if not re.fullmatch(NAME, name)] + [name for name in self.sites if name in TAKEN]
        if wrong or len(set(self.sites)) < len(self.sites):
            raise ConfigError(
                f"names {wrong or list(self.sites)}: a federation (the folder's name), a site and a task are 1 to 63 of a-z, 0-9, '.', "
                f"'_', '-' each, no site is called {' or '.join(sorted(TAKEN))}, and no two alike"
            )

    @property
    def guarded(self) -> bool:
        """Whether the link leaves this machine, and so needs TLS and registered keys."""
        return not loopback(self.host)


def tasks_of(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """``NAME=LABEL,LABEL`` or ``NAME`` by name. Raises `ConfigError` when one has no name or a single label."""
    found = {}
    for text in texts:
        name, equals, labels = text.partition("=")
        kinds = tuple(label.strip() for label in labels.split(",") if label.strip())
        if not name or (equals and len(set(kinds)) < 2):
            raise ConfigError(f"--task {text}: write NAME=LABEL,LABEL,... for classification, or NAME for text that is generated")
        found[name] = kinds
    return found


def write(folder: Path, wanted: Starter) -> list[Path]:
    """Make ``folder`` and return the folders in it, the coordinator's first. Raises `ConfigError` when something is there already."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: exists and is not empty; name a new folder")
    wanted.check()
    coordinator, sites = folder / "coordinator", [folder / name for name in wanted.sites]
    for place in (coordinator, *sites):
        place.mkdir(parents=True)
    if wanted.guarded:
        _guard(folder, coordinator, wanted)
    (coordinator / "federation.toml").write_text(_federation(wanted), encoding="utf-8")
    _settle(folder, wanted)
    return [coordinator, *sites]


def add(folder: Path, sites: Sequence[str]) -> list[Path]:
    """Make folders of more ``sites`` in what `write` made; returns them.

    Raises:
        ConfigError: there is no federation, a name cannot be one or is there already, or the keys to sign with are gone.
    """
    wanted = _begun(folder, sites)
    wanted.check()
    places = [folder / name for name in sites]
    if there := [place for place in places if place.exists()]:
        raise ConfigError(f"{there[0]}: exists; name another site")
    if wanted.guarded:
        if not (folder / "keys/ca.key").exists():
            raise ConfigError(
                f"{folder / 'keys'}: holds no ca.key, which signs sites' keys; bring the folder back that `fedpeft init` wrote"
            )
        issue(folder / "keys", [], [name for name in sites if not (folder / "keys" / f"{name}.key").exists()])
    for place in places:
        place.mkdir()
    _settle(folder, wanted)
    return places


def _begun(folder: Path, sites: Sequence[str]) -> Starter:
    """What was asked for when ``folder`` was made, with ``sites`` in place of its own."""
    path, address = folder / "coordinator/federation.toml", ""
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
        for one in sorted(folder.glob("*/site.toml")):
            address = tomllib.loads(one.read_text(encoding="utf-8"))["coordinator"]
        host, _, port = address.rpartition(":")
        tasks = {name: tuple(task.get("labels", ())) for name, task in told["tasks"].items()}
        return Starter(told["name"], tuple(sites), tasks, host, int(port), told["base"]["model"])
    except FileNotFoundError:
        raise ConfigError(f"{path}: is not there; name the folder that `fedpeft init` wrote, or begin one with --task") from None
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as fault:
        raise ConfigError(f"{folder}: its files cannot be read ({type(fault).__name__}: {fault}); copy a site's folder by hand") from None


def _guard(folder: Path, coordinator: Path, wanted: Starter) -> None:
    """Issue the keys, and put the coordinator's where it finds them."""
    keys = folder / "keys"
    issue(keys, [wanted.host], wanted.sites)
    (coordinator / "sites").mkdir()
    for name in ("ca.crt", "server.pem", "server.key"):
        shutil.copy(keys / name, coordinator)


def _settle(folder: Path, wanted: Starter) -> None:
    """Fill the sites' folders, and let the coordinator know their keys."""
    coordinator, keys = folder / "coordinator", folder / "keys"
    for name in wanted.sites:
        (folder / name / "site.toml").write_text(_site(wanted, name), encoding="utf-8")
        shutil.copy(coordinator / "federation.toml", folder / name)
        if wanted.guarded:
            shutil.copy(keys / f"{name}.key", folder / name)
            shutil.copy(keys / "ca.crt", folder / name)
            shutil.copy(keys / f"{name}.pub", coordinator / "sites")


def quorum(sites: int) -> int:
    """How many of ``sites`` a round needs: all of up to three, then two thirds, so that one that is away holds nobody up."""
    return sites if sites <= 3 else -(-2 * sites // 3)


def _federation(wanted: Starter) -> str:
    tasks = "".join(
        TASK.format(name=name, labels=", ".join(f'"{label}"' for label in labels)) if labels else TEXT.format(name=name)
        for name, labels in wanted.tasks.items()
    )
    listen, guard = ("0.0.0.0", GUARD) if wanted.guarded else ("127.0.0.1", "")
    return FEDERATION.format(
        name=wanted.name, base=wanted.base, sites=quorum(len(wanted.sites)), tasks=tasks, listen=listen, port=wanted.port, guard=guard
    )


def _site(wanted: Starter, name: str) -> str:
    tasks = "".join(ROWS.format(name=task, first="text" if labels else "prompt") for task, labels in wanted.tasks.items())
    guard = KEYS.format(name=name) if wanted.guarded else ""
    return SITE.format(
        name=name,
        host=wanted.host,
        port=wanted.port,
        base=wanted.base,
        guard=guard,
        tasks=tasks,
        quantizations=", ".join(get_args(Quantization)),
    )
