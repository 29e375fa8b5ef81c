from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import Adapter, AdapterSpec, initial, make_spec
from fedpeft.bases import Base, HeadSpec, meta_base
from fedpeft.errors import AdapterError
from fedpeft.methods import Lora
from fedpeft.methods.protocol import Method
from fedpeft.tensors import Entry, Layout, Tensors

Warm = Callable[..., Base]
Placed = tuple[Method, str, HeadSpec]
LABELS = HeadSpec("classification", ("a", "b", "c"))
LM = HeadSpec("lm")

names = st.text(min_size=1, max_size=20)
entries = st.builds(
    Entry, st.sampled_from(["A", "B", "head", "scale"]), names, st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
)
layouts = st.lists(entries, min_size=1, max_size=6, unique_by=lambda entry: entry.name).map(Layout.of)
heads = st.one_of(
    st.just(LM), st.lists(names, min_size=2, max_size=5, unique=True).map(lambda labels: HeadSpec("classification", tuple(labels)))
)


@given(task=names, base=names, model=names, rank=st.integers(1, 64), head=heads, layout=layouts)
def test_json_and_back(task: str, base: str, model: str, rank: int, head: HeadSpec, layout: Layout) -> None:
    spec = AdapterSpec(task, base, model, Lora(r=rank), head, layout)
    back = AdapterSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert back == spec
    assert back.schema == spec.schema


def test_schema_is_over_what_must_agree_and_nothing_else(warm: Warm, lora: Method) -> None:
    spec = make_spec("mail", warm("encoder"), lora, LABELS)
    same = [dataclasses.replace(spec, task="other"), dataclasses.replace(spec, base_model="/elsewhere")]
    other = [
        dataclasses.replace(spec, base="0" * 64),
        dataclasses.replace(spec, head=HeadSpec("classification", ("a", "c", "b"))),
        dataclasses.replace(spec, method=Lora(r=4, targets=("all",), alpha=1.0)),
        dataclasses.replace(spec, layout=spec.layout.subset({"A"})),
    ]
    assert {s.schema for s in same} == {spec.schema}
    assert len({s.schema for s in [spec, *other]}) == 5


def test_digest_sees_task_and_every_value_but_no_path(warm: Warm, lora: Method) -> None:
    spec = make_spec("mail", warm("encoder"), lora, LABELS)
    adapter = initial(warm("encoder"), spec, 1)
    flat = adapter.tensors.flat.copy()
    flat[-1] = np.nextafter(flat[-1], np.float32(9))
    assert Adapter(dataclasses.replace(spec, base_model="/x"), adapter.tensors).digest == adapter.digest
    assert Adapter(dataclasses.replace(spec, task="x"), adapter.tensors).digest != adapter.digest
    assert Adapter(spec, Tensors(spec.layout, flat)).digest != adapter.digest


def test_a_meta_base_gives_the_same_spec_and_the_same_start(warm: Warm, placed: Placed) -> None:
    method, name, head = placed
    base = warm(name)
    meta = meta_base(base.spec)
    spec = make_spec("t", base, method, head)
    assert make_spec("t", meta, method, head) == spec
    adapter = initial(base, spec, 5)
    assert adapter.tensors.finite
    if method.needs_weights:
        with pytest.raises(AdapterError, match="use load_base, not meta_base"):
            initial(meta, spec, 5)
    else:
        assert initial(meta, spec, 5).digest == adapter.digest


def test_start_depends_on_the_seed_alone(warm: Warm, method: Method) -> None:
    import torch

    spec = make_spec("t", warm("encoder"), method, LABELS)
    first = initial(warm("encoder"), spec, 5)
    torch.rand(3)
    np.random.seed(1)
    state = torch.random.get_rng_state()
    assert initial(warm("encoder"), spec, 5).digest == first.digest
    assert torch.equal(torch.random.get_rng_state(), state)
    assert initial(warm("encoder"), spec, 6).digest != first.digest


def test_a_spec_of_another_base_is_refused(warm: Warm, lora: Method) -> None:
    spec = make_spec("t", warm("encoder"), lora, LABELS)
    with pytest.raises(AdapterError, match="load the base that the adapter names"):
        initial(warm("causal"), spec, 0)


def test_tensors_of_another_layout_are_refused(warm: Warm, lora: Method) -> None:
    spec = make_spec("t", warm("encoder"), lora, LABELS)
    with pytest.raises(AdapterError, match="another layout"):
        Adapter(spec, Tensors.zeros(spec.layout.subset({"A"})))


def change(table: dict[str, Any], path: str, value: Any) -> Any:
    table = copy.deepcopy(table)
    *parents, last = path.split(".")
    inner = table
    for parent in parents:
        inner = inner[parent] if isinstance(inner, dict) else inner[int(parent)]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return table


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("task", None, "needs exactly"),
        ("method.kind", "magic", "unknown kind 'magic'"),
        ("method.rank", 3, "unknown keys"),
        ("method.r", "many", "lora.r"),
        ("head.kind", "regression", "regression"),
        ("head", [], "malformed"),
        ("layout", [{"role": "A"}], "malformed"),
        ("layout", [{"role": "A", "name": "x", "shape": [-4]}], "no positive whole number"),
        ("layout", "A", "malformed"),
        ("layout", [{"role": "A", "name": 3, "shape": [4]}], "must be texts"),
        ("layout", [{"role": "A", "name": "x", "shape": [2]}] * 2, "appear twice"),
    ],
)
def test_a_malformed_spec_is_one_clear_line(warm: Warm, lora: Method, path: str, value: Any, says: str) -> None:
    table = make_spec("t", warm("encoder"), lora, LABELS).to_json()
    with pytest.raises(AdapterError, match=says) as caught:
        AdapterSpec.from_json(change(table, path, value))
    assert "\n" not in str(caught.value)
