"""Signed, content-addressed versions of adapters on disk (see README.md)."""

from __future__ import annotations

from fedpeft.registry.manifest import Manifest
from fedpeft.registry.registry import Registry, Version

__all__ = ["Manifest", "Registry", "Version"]
