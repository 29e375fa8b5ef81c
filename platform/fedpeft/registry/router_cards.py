"""The router cards of versions, in this registry or a far one."""

from __future__ import annotations

from dataclasses import replace

from fedpeft.adapters import Adapter
from fedpeft.adapters.folder import parse
from fedpeft.methods.blends.xlora import XLora
from fedpeft.registry.manifest import Manifest
from fedpeft.registry.version import Source
from fedpeft.routing import FILE, Card, RouterCard, derive, learned_of


def router_card(source: Source, ref: str) -> RouterCard:
    """The router card of a version, verified; derived from the adapter where a version of old has no file.

    Raises:
        AdapterError: no such version, or its card cannot be read.
        StorageError: a file or the signature is missing or was changed.
    """
    version = source.get(ref)
    files = source.files(version.digest)
    return RouterCard.from_bytes(files[FILE]) if FILE in files else derived(parse(files, ref), version.manifest)


def derived(adapter: Adapter, manifest: Manifest) -> RouterCard:
    """What an adapter and its manifest alone tell a router. Raises `AdapterError` when the manifest's card cannot be read."""
    card, method = derive(adapter.tensors, None if manifest.card is None else Card.from_json(manifest.card)), adapter.spec.method
    return replace(card, learned=learned_of(adapter.tensors, method.experts)) if isinstance(method, XLora) else card
