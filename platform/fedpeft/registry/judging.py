"""Whether what a stranger pushes may be published: trusted signature, right base, and files that are what the manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path

from fedpeft.adapters.folder import CONFIG, SPEC, TENSORS, digest_in, parse
from fedpeft.errors import AdapterError, BaseError, PolicyError, StorageError
from fedpeft.registry.manifest import Manifest, complete, sha256
from fedpeft.registry.store import Content, Landed
from fedpeft.routing import FILE, RouterCard
from fedpeft.signing import Keys

Offered = Content | Landed
"""A file of a version that is offered; one that landed is not hashed again."""


def judge(manifest: Manifest, files: Mapping[str, Offered], signature: bytes, keys: Keys, base: str) -> None:
    """Refuse a version that is not all that it claims to be. Raises as `Registry.accept` says."""
    check_signer(manifest, signature, keys)
    check_base(manifest, base)
    check_files(manifest, set(files))
    held = {name: _read(content) for name, content in files.items()}
    hashes = {name: content.sha256 if isinstance(content, Landed) else sha256(held[name]) for name, content in files.items()}
    for name, seen in hashes.items():
        if seen != manifest.files[name]:
            raise StorageError(f"{name}: its SHA-256 is {seen[:12]}, the manifest says {manifest.files[name][:12]}; send it again")
    adapter = parse(held, "push")
    if not adapter.tensors.finite:
        raise AdapterError(f"adapter {manifest.task}: holds NaN or infinite values; it is not published")
    if FILE in held:
        RouterCard.from_bytes(held[FILE])
    told = replace(complete(manifest, adapter, {}, digest_in(held)), files=hashes, fedpeft=manifest.fedpeft)
    wrong = [name for name in vars(told) if getattr(told, name) != getattr(manifest, name)]
    if wrong:
        raise AdapterError(f"manifest of {manifest.task}: {wrong} are not those of the adapter that comes with it; publish it anew")


def taken(content: Offered) -> Content:
    """As a store takes it."""
    return content.path if isinstance(content, Landed) else content


def _read(content: Offered) -> bytes:
    content = taken(content)
    return content.read_bytes() if isinstance(content, Path) else content


def check_signer(manifest: Manifest, signature: bytes, keys: Keys) -> None:
    """Raise `PolicyError` unless a trusted key signed the manifest."""
    fault = keys.fault(manifest.to_bytes(), signature)
    if fault and "unknown key" in fault:
        key = Keys.signer(signature)
        raise PolicyError(
            f"manifest of {manifest.task}: signed by key {key}, which this registry does not trust; its operator may run "
            f"`fedpeft adapters trust {key}`"
        )
    if fault:
        raise PolicyError(f"manifest of {manifest.task}: {fault}; publish it anew")


def check_base(manifest: Manifest, base: str) -> None:
    """Raise `BaseError` when the version is for another base than ``base`` (its identity; empty: any)."""
    if base and manifest.base != base:
        raise BaseError(
            f"version of {manifest.task}: was trained on base {manifest.base[:12]} ({manifest.base_model}), this registry is for "
            f"{base[:12]}; train it on the same weights and tokenizer, or push it to another registry"
        )


def check_files(manifest: Manifest, names: set[str]) -> None:
    """Raise `AdapterError` unless manifest and ``names`` are the files of an adapter (a router card may lack), and metrics are numbers."""
    wanted = {CONFIG, TENSORS, SPEC} | ({FILE} & names)
    if set(manifest.files) != wanted or names != wanted:
        seen = sorted(set(manifest.files) | names)
        raise AdapterError(f"version of {manifest.task}: has files {seen}, an adapter has {sorted(wanted)}; publish it anew")
    if not all(isfinite(value) for value in manifest.metrics.values()):
        raise AdapterError(f"manifest of {manifest.task}: a metric is not finite; publish it anew")
