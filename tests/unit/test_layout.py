"""The tree itself: rooms, sizes, the stdlib's `platform`, light imports."""

from __future__ import annotations

import ast
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {"platform": "fedpeft", "client": "fedpeft_client", "coordinator": "fedpeft_coordinator"}
SOURCES = sorted(path for room, package in ROOMS.items() for path in (ROOT / room / package).rglob("*.py") if "v1" not in path.parts)


def test_platform_is_the_standard_librarys():
    assert Path(platform.__file__).is_relative_to(sysconfig.get_paths()["stdlib"])


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_source_root_holds_only_its_package_and_readme(room):
    found = {path.name for path in (ROOT / room).iterdir() if path.name != "__pycache__"}
    assert found <= {ROOMS[room], "README.md"}


def functions():
    """(file, function, its lines but for the docstring) of all sources."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                yield path, node, (node.end_lineno or 0) - body[0].lineno + 1


def test_files_stay_below_300_lines_functions_below_60_and_the_median_function_below_8():
    assert [str(path) for path in SOURCES if path.read_text(encoding="utf-8").count("\n") > 300] == []
    lengths = [(lines, f"{path.name}:{node.lineno} {node.name}") for path, node, lines in functions()]
    assert [where for lines, where in lengths if lines > 60] == []
    assert sorted(lengths)[len(lengths) // 2][0] <= 8


def test_every_room_explains_itself():
    rooms = [path for path in (ROOT / "platform/fedpeft").iterdir() if (path / "__init__.py").exists()]
    rooms += [ROOT / "client/fedpeft_client", ROOT / "coordinator/fedpeft_coordinator"]
    missing = [str(room.relative_to(ROOT)) for room in rooms if not (room / "README.md").exists()]
    assert missing == []


HEAVY = ("torch", "transformers", "peft", "flwr", "sqlalchemy", "sklearn", "pyarrow", "deepspeed", "bitsandbytes", "grpc", "fsspec")


def test_the_command_line_imports_nothing_heavy():
    code = f"import sys\nfrom fedpeft.cli.main import run\nrun(['--help'])\nprint('HEAVY', sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert "adapters" in done.stdout


def test_no_folder_of_tests_is_passed_over():
    """`norecursedirs` matches names at any depth, so a room's name there would hide the tests of that room."""
    import tomllib

    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    passed = {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir() and list(path.glob("test_*.py"))}
    assert not passed & set(options["norecursedirs"])
