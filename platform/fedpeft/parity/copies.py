"""The run's own copies of the user's files: the same federation and sites on the loopback interface, with all state in one folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.bases.spec import rooted_model
from fedpeft.config import read_toml
from fedpeft.errors import ConfigError
from fedpeft.files import write_atomic
from fedpeft.parity.plan import MARK
from fedpeft.tasks import Source

if TYPE_CHECKING:
    from fedpeft.bases.spec import BaseSpec

ELSEWHERE = ("registry", "database", "control", "link")
"""Tables of a federation that name other places than this machine and this folder."""
BEYOND = ("tls", "auth", "peers", "serve", "supernode_port")
"""The same of a site."""


def tables(federation: Path, sites: Sequence[Path], port: int) -> dict[str, dict[str, Any]]:
    """The copies of ``federation`` and ``sites`` by the name of their file; the coordinator will listen on ``port`` of the loopback.

    Raises:
        ConfigError: a file cannot be read, or the federation needs more sites than there are.
    """
    return arranged({path: read_toml(path) for path in (federation, *sites)}, port)


def arranged(read: Mapping[Path, dict[str, Any]], port: int) -> dict[str, dict[str, Any]]:
    """As `tables`, of what was ``read``: the federation's file first. Raises `ConfigError`."""
    (federation, table), *sites = read.items()
    made = {MARK: _federation(table, federation.resolve().parent, len(sites), port)}
    copied = (_site(site, path.resolve().parent, port) for path, site in sites)
    return made | {f"{site['name']}.toml": site for site in copied}


def digest(federation: Path, sites: Sequence[Path]) -> str:
    """SHA-256 over all that the copies say, for runs that are taken up again. Raises `ConfigError` as `tables`."""
    return hashlib.sha256(json.dumps(tables(federation, sites, 0), sort_keys=True, default=str).encode()).hexdigest()


def write_toml(path: Path, table: Mapping[str, Any]) -> None:
    """Write ``table``, without what is None. Raises `StorageError`."""
    import tomli_w

    write_atomic(path, tomli_w.dumps(_plain(table)).encode())


def describe(spec: BaseSpec) -> dict[str, Any]:
    """``spec`` as a table of a TOML file."""
    return {"model": spec.model, "quantization": spec.quantization, "revision": spec.revision, "max_tokens": spec.max_tokens}


def _federation(table: dict[str, Any], folder: Path, sites: int, port: int) -> dict[str, Any]:
    cohort = table.get("cohort", {})
    if cohort.get("min_sites", 1) > sites:
        raise ConfigError(f"cohort.min_sites = {cohort['min_sites']} and {sites} site file(s): name as many sites, or lower it")
    masks = {key: value for key, value in table.get("secure_aggregation", {}).items() if key != "identities"}
    kept = {key: value for key, value in table.items() if key not in ELSEWHERE}
    here = {"state": "coordinator", "link": {"host": "127.0.0.1", "port": port}, "cohort": {**cohort, "wait_for_sites": sites}}
    return kept | here | _base(table, folder) | ({"secure_aggregation": masks} if masks else {})


def _site(table: dict[str, Any], folder: Path, port: int) -> dict[str, Any]:
    data = {task: Source.model_validate(source).rooted(folder).model_dump(exclude_defaults=True) for task, source in table["data"].items()}
    kept = {key: value for key, value in table.items() if key not in BEYOND}
    return kept | {"coordinator": f"127.0.0.1:{port}", "state": table["name"], "data": data} | _base(table, folder)


def _base(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The table of the base, where there is one, with a path in it taken from ``folder``."""
    base = table.get("base", {})
    return {"base": {**base, "model": rooted_model(folder, str(base["model"]))}} if "model" in base else {}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
