"""Who may connect: the link knows the sites whose public keys lie in a folder, also after that folder changed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.errors import ConfigError, FedpeftError, LinkError
from fedpeft_coordinator.children import Tell

if TYPE_CHECKING:
    from fedpeft.wire._compat import Endpoint

LOOK_SECONDS = 2.0


def key_files(folder: Path) -> list[Path]:
    """The sites' public keys. Raises `ConfigError` when there are none."""
    found = sorted(folder.glob("*.pub"))
    if not found:
        raise ConfigError(f"link.node_keys = {folder}: holds no NAME.pub; put each site's public key there, or set link.node_auth = false")
    return found


@dataclass
class Admission:
    """Keeps the nodes that the link at ``endpoint()`` lets in to the NAME.pub in ``folder``; ``tell`` hears who comes and goes later.

    ``barred`` are the sites that were shut out and not let in since: nobody need wait for them.
    """

    folder: Path
    endpoint: Callable[[], Endpoint]
    tell: Tell
    barred: frozenset[str] = frozenset()
    _keys: dict[str, bytes] = field(default_factory=dict)
    _begun: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def settle(self) -> None:
        """Let in who has a key here, and shut out whose key is gone or is another now.

        Raises:
            ConfigError: there is no key, or a file holds none; nobody is let in or shut out.
            LinkError: the link does not answer, or takes a key no more that it once shut out; the others are as they should be.
        """
        from fedpeft.wire._compat import list_nodes, pem

        with self._lock:
            keys = {path.stem: pem(path) for path in key_files(self.folder)}
            known = {node.name: node.node for node in list_nodes(self.endpoint()) if node.status != "unregistered"}
            for name in [name for name in known if name not in keys or self._keys.get(name, keys[name]) != keys[name]]:
                self._shut_out(name, known.pop(name))
            faults = [fault for name in sorted(keys.keys() - known.keys()) if (fault := self._let_in(name, keys[name]))]
            if faults:
                raise faults[0]
            self._begun = True

    def _shut_out(self, name: str, node: int) -> None:
        from fedpeft.wire._compat import unregister_node

        unregister_node(self.endpoint(), node, name)
        self._keys.pop(name, None)
        self.barred |= {name}
        self.tell("shut_out", site=name)

    def _let_in(self, name: str, key: bytes) -> LinkError | None:
        from fedpeft.wire._compat import register_node

        try:
            register_node(self.endpoint(), key, name)
        except LinkError as fault:
            if name not in self.barred:
                return fault
            return LinkError(
                f"site {name} was shut out, and its key is taken again only when the coordinator starts anew; stop it and run it again"
            )
        if self._begun and self._keys.get(name) != key:  # at the start the greeting names them all, and a new link is told again
            self.tell("let_in", site=name)
        self._keys[name] = key
        self.barred -= {name}
        return None

    def keep(self, stopping: Callable[[], bool]) -> None:
        """Settle whenever the folder has changed and lies still, until ``stopping()``; a fault is told once and tried again."""
        settled, before, told = self._seen(), None, ""
        while not stopping():
            time.sleep(LOOK_SECONDS)
            found = self._seen()
            if found == before != settled:
                fault = self._fault()
                settled = settled if fault else found
                if fault and fault != told:
                    self.tell("admission", reason=fault)
                told = fault
            before = found

    def _fault(self) -> str:
        try:
            self.settle()
        except FedpeftError as fault:
            return str(fault)
        return ""

    def _seen(self) -> dict[str, tuple[int, int]]:
        try:
            with os.scandir(self.folder) as files:
                found = [(file.name, file.stat()) for file in files if file.name.endswith(".pub")]
        except OSError:
            return {}
        return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found}
