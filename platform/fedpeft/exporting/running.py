"""Write one form, then prove it."""

from __future__ import annotations

from pathlib import Path

from fedpeft.errors import AdapterError
from fedpeft.exporting.formats import Checked, Export, Format, Written


def exported(format: Format, export: Export, folder: Path, check: bool) -> tuple[Written, Checked | None]:
    """Write ``folder`` in ``format``; with ``check`` reload it and compare.

    Raises:
        AdapterError: the form cannot say this adapter, or what was written is further off than rounding; it stays, to be looked at.
        StorageError: the folder exists or cannot be written.
        ConfigError, BaseError: what the form needs is not here.
    """
    written = format.write(export, folder)
    if not check:
        return written, None
    found = format.check(export, folder)
    if not found.same:
        raise AdapterError(
            f"{folder}: {found.what} are up to {found.difference:.2e} off (largest {found.scale:.3g}), more than rounding; do not serve it"
        )
    return written, found
