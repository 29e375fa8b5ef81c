"""Round 0 without the base: the settings that were read of its config draw the very bits that the base does, for every method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fedpeft.adapters import initial, make_spec
from fedpeft.adapters.drawing import draw, needed
from fedpeft.bases import BaseSpec, HeadSpec, meta_base
from fedpeft.config import build
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS

ENCODERS = {"attempt"}
SETTINGS = {"trainable-tokens": {"tokens": [10, 11]}}


@pytest.mark.filterwarnings("ignore")
def test_what_was_read_of_the_config_draws_the_same_bits(folders: dict[str, Path], tmp_path: Path) -> None:
    bases = {}
    for name, original in folders.items():
        path = shutil.copytree(original, tmp_path / name)
        table = json.loads((path / "config.json").read_text()) | {"initializer_range": 0.3}
        (path / "config.json").write_text(json.dumps(table))
        bases[name] = meta_base(BaseSpec(str(path), max_tokens=32))
    drawn = {}
    for kind in sorted(set(METHODS) - {"vpt"}):
        name, head = ("encoder", HeadSpec("classification", ("a", "b"))) if kind in ENCODERS else ("causal", HeadSpec("lm"))
        try:
            spec = make_spec("t", bases[name], build(METHODS, {"kind": kind, **SETTINGS.get(kind, {})}, "method"), head)
        except AdapterError:
            continue  # it is put on weights alone
        reads = needed(spec, bases[name].config)
        if reads is None:
            with pytest.raises(AdapterError):
                initial(bases[name], spec, 3)
            continue
        found = draw(spec, 3, SimpleNamespace(**json.loads(json.dumps(reads))))
        expected = initial(bases[name], spec, 3).tensors.named()
        assert all(np.array_equal(values, expected[entry.name]) for entry, values in found.items()), kind
        drawn[kind] = reads
    assert drawn["lora"] == {}
    assert drawn["prompt"] == {"initializer_range": 0.3}
    assert len(drawn) > len(METHODS) // 2
