"""What a base is made of, as SHA-256: read in a stream, no tensor library needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedpeft.bases.resolve import resolve_model
from fedpeft.bases.spec import BaseSpec, Fingerprint
from fedpeft.errors import BaseError

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
PROCESSOR = "preprocessor_config.json"
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", PROCESSOR)
# Where a copy of a model came from and who wrote it; the weights mean the same whatever these say.
BOOKKEEPING = frozenset({"_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "chat_template"})
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def fingerprint(spec: BaseSpec) -> Fingerprint:
    """Hash the files of ``spec``; a file is hashed again only when its size or time of change differs.

    Raises:
        BaseError: the folder has no config.json, no safetensors weights (pickled ones are refused), or no tokenizer and no image processor.
    """
    folder = resolve_model(spec.model, spec.revision)
    files = check_folder(folder, spec.model)
    config = _canonical(folder / "config.json", spec.model)
    settings = [f"{name}:{_canonical(folder / name, spec.model)}" for name in SETTINGS_FILES if (folder / name).is_file()]
    tokenizer = [f"{name}:{_file(folder / name)}" for name in TOKENIZER_FILES if (folder / name).is_file()]
    return Fingerprint(
        weights=_digest([config, *(f"{path.name}:{_file(path)}" for path in files)]),
        tokenizer=_digest(tokenizer + settings),
        template=_digest(_templates(folder, spec.model)),
        quantization=spec.quantization,
    )


def check_folder(folder: Path, model: str) -> list[Path]:
    """The weight files of ``folder``, sorted by name. Raises `BaseError` when the folder is not a model we may load."""
    if not (folder / "config.json").is_file():
        raise BaseError(f"base {model}: {folder} has no config.json; name the folder that save_pretrained wrote")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        why = (
            f"only pickled weights {pickled[:3]}, which are never loaded; convert them to safetensors"
            if pickled
            else "no *.safetensors file"
        )
        raise BaseError(f"base {model}: {folder} has {why}")
    if not any((folder / name).is_file() for name in (*TOKENIZER_FILES, PROCESSOR)):
        raise BaseError(
            f"base {model}: {folder} has no tokenizer (one of {', '.join(TOKENIZER_FILES)}), nor {PROCESSOR} for images; "
            "copy it from the model's origin"
        )
    return weights


def read_json(path: Path, model: str) -> dict[str, Any]:
    """A JSON object from ``path``. Raises `BaseError` when it is unreadable or not an object."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise BaseError(f"base {model}: {path} cannot be read as JSON ({fault}); fetch the file again") from None
    if not isinstance(table, dict):
        raise BaseError(f"base {model}: {path} holds no JSON object; fetch the file again")
    return table


def _canonical(path: Path, model: str) -> str:
    table = {key: value for key, value in read_json(path, model).items() if key not in BOOKKEEPING}
    return json.dumps(table, sort_keys=True, separators=(",", ":"))


def _templates(folder: Path, model: str) -> list[str]:
    """Every chat template in its text form: of tokenizer_config.json and of the .jinja files."""
    config = folder / "tokenizer_config.json"
    inline = read_json(config, model).get("chat_template") if config.is_file() else None
    return [json.dumps(inline)] * (inline is not None) + [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.jinja"))]


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _file(path: Path) -> str:
    stat = path.stat()
    return _hash(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
