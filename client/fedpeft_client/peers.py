"""Whom a site believes to be the federation's sites: public keys from its file, or those that it saw first."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import StorageError
from fedpeft.files import write_atomic
from fedpeft.privacy.secagg import Bundle, Instance, Pins, signer

log = logging.getLogger("fedpeft.peers")


@dataclass(frozen=True)
class Peers:
    """``pinned`` (``[peers]`` of the site's file) is all that counts; where it is empty, ``path`` remembers who came first.

    Trust on first use keeps a coordinator from changing a site's key later, not from inventing sites at the beginning.
    """

    path: Path
    pinned: Mapping[str, str]

    def believed(self, bundles: Iterable[Bundle], instance: Instance) -> Pins:
        """Public keys by site, with those of ``bundles`` that were never seen before and hold. Raises `StorageError`."""
        if self.pinned:
            return self.pinned
        known = self._read()
        fresh = {bundle.site: key for bundle in bundles if bundle.site not in known and (key := signer(bundle, instance))}
        if fresh:
            log.warning("identities of %s are believed from now on; list them under [peers] to be sure of them", sorted(fresh))
            write_atomic(self.path, json.dumps({**known, **fresh}, indent=1, sort_keys=True).encode())
        return {**known, **fresh}

    def known(self) -> Pins:
        """Public keys by site. Raises `StorageError`."""
        return self.pinned or self._read()

    def _read(self) -> dict[str, str]:
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(name): str(key) for name, key in rows.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, RecursionError) as fault:
            raise StorageError(
                f"{self.path}: cannot be read ({fault}); restore it, or list the sites under [peers] of the site's file"
            ) from None
