"""A state folder that cannot be written ends `client join` at once, in one line and with the exit code of storage."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import StorageError
from fedpeft_client.join import join


@pytest.mark.parametrize("trouble", ["a disk without room", "no folder may be made"])
def test_a_state_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path, forked: Callable[..., Any], trouble: str) -> None:
    (tmp_path / "taken").write_text("a file where a folder would be")
    state = "state" if trouble.startswith("a disk") else "taken/state"
    site = tmp_path / "site.toml"
    site.write_text(f'name = "north"\ncoordinator = "127.0.0.1:1"\nstate = "{state}"\n[data.kinds]\npath = "rows.jsonl"\n')

    def work(say: Callable[..., None]) -> None:
        if trouble.startswith("a disk"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # stands for a full one: files may be made, not filled
        try:
            join(site, lambda *_: None)
        except StorageError as fault:
            say(fault.exit_code, fault)

    (line,), code = forked(work).end()
    assert code == 0
    assert line.startswith(f"9 {tmp_path / state}")
    assert "cannot be written: " in line
