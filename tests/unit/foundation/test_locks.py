"""One process at a time in a folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fedpeft.errors import StorageError
from fedpeft.locks import NAME, clear, held, holder


def test_who_comes_second_is_told_who_holds_it(tmp_path):
    path = tmp_path / "state" / NAME
    assert holder(path) is None
    with held(path, "bakes", "bake elsewhere"):
        assert holder(path) == os.getpid()
        clear(path.parent)
        with (
            pytest.raises(StorageError, match=f"process {os.getpid()} bakes; stop it, or bake elsewhere"),
            held(path, "bakes", "bake elsewhere"),
        ):
            pass
    assert holder(path) is None
    with pytest.raises(BlockingIOError), held(path, "bakes", ""):
        raise BlockingIOError  # a fault of what runs inside is not the lock's
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"), held(tmp_path / "file" / NAME, "", ""):
        pass


def test_a_lock_goes_with_its_holder(tmp_path):
    script = "import sys, os; from pathlib import Path; from fedpeft.locks import held\n"
    script += "with held(Path(sys.argv[1]), '', ''): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / NAME)], check=False).returncode == -9
    with held(tmp_path / NAME, "", ""):
        assert holder(tmp_path / NAME) == os.getpid()


def test_all_but_the_lock_is_cleared_and_links_are_not_followed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "dear").touch()
    folder = tmp_path / "run"
    (folder / "deep" / "er").mkdir(parents=True)
    for name in (NAME, "file"):
        (folder / name).touch()
    (folder / "link").symlink_to(tmp_path / "kept")
    clear(folder)
    assert [path.name for path in folder.iterdir()] == [NAME]
    assert (tmp_path / "kept" / "dear").exists()


def test_a_folder_made_for_a_lock_is_as_closed_as_asked(tmp_path):
    with held(tmp_path / "own" / NAME, "", "", 0o700), held(tmp_path / "own" / "deep" / NAME, "", ""):
        assert [path.stat().st_mode & 0o777 for path in (tmp_path / "own", tmp_path / "own/deep")] == [0o700, 0o777 & ~_mask()]


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
