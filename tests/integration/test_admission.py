"""Sites come and go while a real SuperLink runs: their keys in a folder are all that an operator touches."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from fedpeft.issuing import issue
from fedpeft.wire._compat import list_nodes
from fedpeft_coordinator import admission
from fedpeft_coordinator.config import Link, Tls
from fedpeft_coordinator.supervise import LinkProcess

pytestmark = pytest.mark.integration


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Public keys of two sites; a third one's and another one's of the first lie in folders beside it."""
    folder = tmp_path / "keys"
    issue(folder, ["localhost"], ["north", "south"])
    for name, site in (("later", "west"), ("other", "north")):
        issue(tmp_path / name, ["localhost"], [site])
    return folder


def until(holds: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.1)


def test_keys_in_the_folder_are_who_may_connect(tmp_path: Path, free_port: int, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "LOOK_SECONDS", 0.05)
    told: list[tuple[str, str]] = []

    def tell(event: str, **facts: Any) -> None:
        if event != "link":
            told.append((event, facts.get("site", facts.get("reason"))))

    tls = Tls(ca=keys / "ca.crt", cert=keys / "server.pem", key=keys / "server.key")
    link = LinkProcess(Link(port=free_port, tls=tls, node_auth=True, node_keys=keys), tmp_path / "link", tell)
    link.start()

    def inside() -> set[str]:
        try:
            return {node.name for node in list_nodes(link.endpoint) if node.status != "unregistered"}
        except admission.FedpeftError:
            return set()  # it is not up yet

    try:
        until(lambda: inside() == {"north", "south"})
        assert told == []
        shutil.copy(tmp_path / "later" / "west.pub", keys)
        until(lambda: inside() == {"north", "south", "west"})
        kept = (keys / "south.pub").read_text()
        (keys / "south.pub").unlink()
        until(lambda: inside() == {"north", "west"})
        shutil.copy(tmp_path / "other" / "north.pub", keys)
        until(lambda: len(told) == 4)
        assert inside() == {"north", "west"}
        assert told == [("let_in", "west"), ("shut_out", "south"), ("shut_out", "north"), ("let_in", "north")]
        away = keys.rename(tmp_path / "away")
        until(lambda: "holds no NAME.pub" in told[-1][1])
        (away / "west.pub").write_text("no key")
        away.rename(keys)
        until(lambda: "west.pub: is not an OpenSSH" in told[-1][1])
        assert inside() == {"north", "west"}
        shutil.copy(tmp_path / "later" / "west.pub", keys)
        (keys / "south.pub").write_text(kept)
        until(lambda: "site south was shut out" in told[-1][1])
        assert (inside(), link.barred) == ({"north", "west"}, {"south"})
    finally:
        link.stop()
