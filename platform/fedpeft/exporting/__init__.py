"""Adapters in the forms that other servers take, and the proof that what was written says the same (see README.md)."""

from __future__ import annotations

from fedpeft.exporting.formats import FORMATS, Export, Format, Written, make_format
from fedpeft.exporting.running import exported

__all__ = ["FORMATS", "Export", "Format", "Written", "exported", "make_format"]
