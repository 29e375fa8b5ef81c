"""Signed, content-addressed versions of adapters (see README.md)."""

from __future__ import annotations

from fedpeft.registry.manifest import Manifest
from fedpeft.registry.registry import Registry
from fedpeft.registry.router_cards import router_card
from fedpeft.registry.store import open_store
from fedpeft.registry.version import Library, Source, Version

__all__ = ["Library", "Manifest", "Registry", "Source", "Version", "open_store", "router_card"]
