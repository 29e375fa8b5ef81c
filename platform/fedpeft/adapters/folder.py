"""The HF PEFT folder of an adapter, plus ``fedpeft.json`` with the spec; written whole or not at all, read without pickle.

::

    adapter_config.json          what peft.PeftModel.from_pretrained reads
    adapter_model.safetensors    the tensors, float32, under peft's names
    fedpeft.json                 {"format", "digest", "spec", "extra"}
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as write_safetensors

from fedpeft.adapters.spec import Adapter, AdapterSpec
from fedpeft.errors import AdapterError, StorageError
from fedpeft.files import sync_folder, write_all
from fedpeft.tensors import Tensors

CONFIG, TENSORS, SPEC = "adapter_config.json", "adapter_model.safetensors", "fedpeft.json"
FORMAT = 1


def save(adapter: Adapter, folder: Path, manifest_extra: Mapping[str, Any] | None = None) -> None:
    """Write ``adapter`` into the new ``folder``: a temporary sibling, fsync, rename; equal adapters give equal bytes.

    Raises:
        StorageError: the folder exists already, or the disk is full, read-only or gone; nothing is left behind.
    """
    folder = Path(folder)
    write_folder(folder, contents(adapter, manifest_extra))


def contents(adapter: Adapter, extra: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """File name -> bytes of the folder that `save` writes. Raises `AdapterError` when a value is not finite."""
    spec = adapter.spec
    if not adapter.tensors.finite:
        raise AdapterError(f"adapter {spec.task}: holds NaN or infinite values; it is not saved, go back to the last version")
    config = spec.method.peft_config(spec.base_model, spec.head, spec.layout)
    if spec.images:
        config["task_type"] = None  # peft's sequence classifiers hand input_ids on
    table = {"format": FORMAT, "digest": adapter.digest, "spec": spec.to_json(), "extra": dict(extra or {})}
    return {CONFIG: _json(config), TENSORS: write_safetensors(dict(adapter.tensors.named()), {"format": "pt"}), SPEC: _json(table)}


def load(folder: Path) -> Adapter:
    """Read what `save` wrote.

    Raises:
        StorageError: a file is missing, unreadable, torn, or does not match the digest.
        AdapterError: the method is unknown, or names, shapes or types are not those of the spec.
    """
    folder = Path(folder)
    return parse({name: _read(folder / name) for name in (SPEC, TENSORS)}, str(folder))


def parse(files: Mapping[str, bytes], where: str) -> Adapter:
    """The adapter in the ``files`` of a folder, which lies at ``where`` for people; raises what `load` raises."""
    missing = [name for name in (SPEC, TENSORS) if name not in files]
    if missing:
        raise StorageError(f"{where}: {missing} are missing; an adapter folder holds {CONFIG}, {TENSORS} and {SPEC}")
    table = _table(files[SPEC], f"{where}/{SPEC}")
    spec = AdapterSpec.from_json(table["spec"])
    named = _tensors(files[TENSORS], f"{where}/{TENSORS}")
    _check_shapes(where, spec, named)
    adapter = Adapter(spec, Tensors.from_named(spec.layout, named))
    if adapter.digest != table.get("digest"):
        raise StorageError(f"{where}: the tensors do not match the digest in {SPEC}; the folder was changed, fetch the adapter again")
    return adapter


def digest_in(files: Mapping[str, bytes]) -> str:
    """The digest that the ``files`` of a folder say their adapter has; that of the adapter which `parse` made of them."""
    return str(_table(files[SPEC], SPEC)["digest"])


def write_folder(folder: Path, files: Mapping[str, bytes | Path], durable: bool = True) -> None:
    """Make ``folder`` with ``files``, whole or not at all; files given as paths are moved into it.

    Unless it is ``durable``, a power cut may leave it torn: for those who check what they read.

    Raises:
        StorageError: it exists or cannot be written; files given as paths may be gone then, others are as they were.
    """
    partial: Path | None = None
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StorageError(f"{folder}: exists already; name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        for name, data in files.items():
            _write(partial / name, data, durable)
        partial.chmod(0o755)
        if durable:
            sync_folder(partial)
        partial.rename(folder)
        if durable:
            sync_folder(folder.parent)
    except OSError as fault:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"{folder}: cannot be written: {fault.strerror or fault}; free space or choose another place") from None


def _write(path: Path, data: bytes | Path, durable: bool) -> None:
    if isinstance(data, Path):
        shutil.move(data, path)
    else:
        with open(path, "xb", buffering=0) as stream:
            write_all(stream.fileno(), data)
    if durable:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())


def _json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, sort_keys=True, indent=1) + "\n").encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise StorageError(f"{path}: no such file; an adapter folder holds {CONFIG}, {TENSORS} and {SPEC}") from None
    except OSError as fault:
        raise StorageError(f"{path}: cannot be read: {fault.strerror or fault}") from None


def _table(data: bytes, where: str) -> dict[str, Any]:
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as fault:
        raise StorageError(f"{where}: torn or not JSON ({fault}); fetch the adapter again") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT or "spec" not in table:
        raise AdapterError(f"{where}: not of format {FORMAT}; it was written by another version of fedpeft, upgrade or export it anew")
    return table


def _check_shapes(where: str, spec: AdapterSpec, named: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Before anything is allocated: a spec from outside may claim any size."""
    wrong = [entry.name for entry in spec.layout.entries if entry.name in named and named[entry.name].shape != entry.shape]
    if wrong:
        raise AdapterError(f"{where}: shapes of {wrong[:3]} in {TENSORS} are not those of {SPEC}; fetch the adapter again")


def _tensors(data: bytes, where: str) -> dict[str, np.ndarray[Any, Any]]:
    try:
        named: dict[str, np.ndarray[Any, Any]] = parse_safetensors(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as fault:
        raise StorageError(f"{where}: torn or not safetensors ({fault}); fetch the adapter again") from None
    wrong = sorted(name for name, values in named.items() if values.dtype != np.float32)
    if wrong:
        raise AdapterError(f"{where}: {wrong[:3]} are not float32; convert the tensors to float32")
    return named
