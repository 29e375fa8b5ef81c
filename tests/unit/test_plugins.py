"""docs/plug-ins.md, run: an installed package's scheme and method are in the tables and in the verbs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedpeft import plugins
from fedpeft.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "docs/plug-ins.md").read_text(encoding="utf-8")
CHECK = """
import numpy as np
from fedpeft.cli.main import run
assert run(["schemes", "show", "burst"]) == 0
assert run(["methods", "show", "ortho"]) == 0
from fedpeft.config import build
from fedpeft.methods import read_method
from fedpeft.schemes import SCHEMES
from fedpeft.tensors import Entry, Layout
burst = build(SCHEMES, {"kind": "burst", "length": 2}, "scheme")
layout = Layout((Entry("A", "m.lora_A.weight", (4, 8)), Entry("B", "m.lora_B.weight", (8, 4))))
assert [burst.phase(n, layout).name for n in range(1, 7)] == ["B", "B", "A", "B", "B", "A"]
assert burst.exact(layout)
start = read_method({"kind": "ortho", "r": 4}).initial(layout.entries[0], np.random.default_rng(0), None)
np.testing.assert_allclose(start @ start.T, np.eye(4), atol=1e-6)
"""


def test_the_page_is_what_runs(tmp_path):
    """As an installed distribution: its metadata beside its module, on the path."""
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    project = tomllib.loads(re.search(r"```toml\n(.*?)```", PAGE, re.S)[1])["project"]
    (tmp_path / "my_fedpeft.py").write_text(code)
    info = tmp_path / "my_fedpeft-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in table.items()) for group, table in project["entry-points"].items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", path + CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "B for ``length`` rounds" in done.stdout
    assert "LoRA whose A starts with orthonormal rows" in done.stdout


class Bare:
    """A method that says nothing of itself."""

    kind = "bare"


@pytest.mark.parametrize(
    ("name", "target", "group", "why"),
    [
        ("mine", "nowhere_at_all:Mine", "fedpeft.schemes", "cannot be imported: ModuleNotFoundError"),
        ("mine", "fedpeft.schemes:FFA", "fedpeft.schemes", "the class's kind is 'ffa'"),
        ("ffa", "fedpeft.schemes:FFA", "fedpeft.schemes", "the name is taken"),
        ("bare", "bare_for_tests:Bare", "fedpeft.methods", "has no `facts"),
    ],
)
def test_a_plug_in_that_does_not_fit_is_named(monkeypatch, name, target, group, why):
    monkeypatch.setitem(sys.modules, "bare_for_tests", SimpleNamespace(Bare=Bare))
    with pytest.raises(ConfigError, match=why):
        plugins.add({"ffa": Bare}, EntryPoint(name, target, group))


def test_a_plug_in_is_added_once_or_again():
    from fedpeft.schemes import FFA

    table = {}
    for _ in range(2):
        plugins.add(table, EntryPoint("ffa", "fedpeft.schemes:FFA", "fedpeft.schemes"))
    assert table == {"ffa": FFA}
