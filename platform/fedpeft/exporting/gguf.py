"""A GGUF LoRA by llama.cpp's own converter, run as a process; the file's header is read to see that all of it arrived."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from fedpeft.adapters import save
from fedpeft.bases import resolve_model
from fedpeft.errors import AdapterError, ConfigError, StorageError
from fedpeft.exporting.formats import Checked, Export, Written
from fedpeft.methods import Lora

NAME = "adapter.gguf"
HEADER = struct.Struct("<4sIQQ")
"""Magic, version, number of tensors, number of metadata entries."""
SECONDS = 600


def write(export: Export, folder: Path, converter: str, outtype: str) -> Written:
    """Run the converter on a PEFT folder of the adapter.

    Raises:
        ConfigError: the converter is not where it was said to be, nor on PATH.
        AdapterError: the adapter is no plain LoRA, or the converter fails; its last words are in the message.
        StorageError: the folder exists.
    """
    program, (adapter, spec) = find(converter), (export.adapter, export.adapter.spec)
    if not isinstance(spec.method, Lora) or spec.method.dora or spec.method.extra or spec.head.kind != "lm":
        raise AdapterError(
            f"adapter {spec.task}: GGUF takes a plain LoRA on a language model, this is {spec.method.kind} with a {spec.head.kind} head; "
            "make one of it with fedpeft adapters convert"
        )
    if folder.exists() and any(folder.iterdir()):
        raise StorageError(f"{folder}: exists already; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, made = Path(scratch) / "peft", Path(scratch) / NAME
        save(adapter, source)
        _run([*program, "--base", str(resolve_model(spec.base_model)), "--outtype", outtype, "--outfile", str(made), str(source)], made)
        made.rename(folder / NAME)
    return Written(folder, (f"serve it with llama-server -m BASE.gguf --lora {folder / NAME}",))


def find(converter: str) -> list[str]:
    """How to run the converter: a path, or a name on PATH. Raises `ConfigError` when there is none."""
    given = Path(converter).expanduser()
    found = str(given) if given.is_file() else shutil.which(converter)
    if found is None:
        raise ConfigError(
            f"export: {converter} is neither a file nor on PATH; it comes with llama.cpp's sources (pip install gguf beside them): "
            "give its path with --set converter=/path/to/convert_lora_to_gguf.py"
        )
    return [sys.executable, found] if found.endswith(".py") and not os.access(found, os.X_OK) else [found]


def check(export: Export, folder: Path) -> Checked:
    """The number of tensors in the file. Raises `AdapterError` when it is no GGUF file or lacks some; logits need llama.cpp itself."""
    wanted = len(export.adapter.spec.layout.entries)
    found = tensors_in(folder / NAME)
    if found != wanted:
        raise AdapterError(
            f"{folder / NAME}: holds {found} tensors, the adapter has {wanted}; the converter left some out, do not serve it"
        )
    return Checked(f"all {found} tensors are in the file; logits can be compared by llama.cpp alone")


def tensors_in(path: Path) -> int:
    """How many tensors a GGUF file says it has. Raises `AdapterError` when it is none."""
    with open(path, "rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size or head[:4] != b"GGUF":
        raise AdapterError(f"{path}: is no GGUF file; did the converter fail?")
    return int(HEADER.unpack(head)[2])


def _run(command: list[str], made: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise AdapterError(f"export: {command[0]} did not run: {fault}") from None
    if done.returncode or not made.is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "it says nothing").splitlines()[-1][:200]
        raise AdapterError(f"export: the converter failed with code {done.returncode}: {last}")
