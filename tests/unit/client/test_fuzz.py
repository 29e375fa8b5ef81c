"""Plans from a hostile coordinator: a site answers with a named failure or refusal, never with a crash, a hang or a large allocation."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedpeft import config
from fedpeft.adapters import AdapterSpec
from fedpeft.bases import HeadSpec
from fedpeft.errors import FedpeftError, StorageError, UpdateError
from fedpeft.methods import METHODS
from fedpeft.schemes import SCHEMES
from fedpeft.tasks import Classification
from fedpeft.tensors import Entry, Layout
from fedpeft.training import TrainSettings
from fedpeft.wire.v1.federation_pb2 import RoundPlan, TaskPlan
from fedpeft_client import plan
from fedpeft_client.peers import Peers

LABELS = ("animal", "tool")
LAYOUT = Layout.of(
    [Entry("A", "x.lora_A.weight", (4, 6)), Entry("B", "x.lora_B.weight", (6, 4)), Entry("head", "classifier.weight", (2, 6))]
)
SPEC = AdapterSpec("kinds", "ab" * 32, "tiny", METHODS["lora"](r=4), HeadSpec("classification", LABELS), LAYOUT)  # type: ignore[call-arg]
FIELDS = {
    "task_json": config.describe(Classification("kinds", LABELS)),
    "spec_json": SPEC.to_json(),
    "scheme_json": {"kind": "alternating"},
    "settings_json": dataclasses.asdict(TrainSettings()),
}
SCHEME_TABLES = [{"kind": kind, **{f.name: 1 for f in dataclasses.fields(made) if f.init}} for kind, made in sorted(SCHEMES.items())]  # type: ignore[arg-type]
HOSTILE = ["", "[" * 100_000, "9" * 5000, "NaN", "null", "[]", '{"kind": []}', '{"kind": {}}', "\0", '"' + "x" * 100_000]


def work(**changes: object) -> object:
    texts = {name: changes.pop(name, json.dumps(table)) for name, table in FIELDS.items()}
    given_ = TaskPlan(**{"task": "kinds", "roles": ["B", "head"], "grid_sites": 3, "grid_reach": 2.0, "task_round": 1, **texts, **changes})
    return plan.read(RoundPlan(federation="f", run="r", round=1, tasks=[given_]), given_)


def test_the_specimen_itself_is_read() -> None:
    assert work().up.roles == {"B", "head"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("field", sorted(FIELDS))
@given(data=st.data())
def test_a_garbled_field_is_a_named_fault(field, data, tables, bounded):
    with bounded(20_000_000), contextlib.suppress(FedpeftError):
        work(**{field: json.dumps(data.draw(tables(FIELDS[field])))}).up  # noqa: B018 - computed


@pytest.mark.parametrize("field", sorted(FIELDS))
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_are_named_faults(field, text):
    with pytest.raises(FedpeftError):
        work(**{field: text})


@pytest.mark.parametrize("text", HOSTILE[1:], ids=range(1, len(HOSTILE)))
def test_a_hostile_codec_is_a_named_fault(text):
    with pytest.raises(FedpeftError):
        work(codec_json=text)


def test_a_setting_that_the_site_does_not_know_is_refused():
    with pytest.raises(UpdateError, match=r"unknown keys \['noise_multiplier'\]"):
        work(settings_json=json.dumps({**FIELDS["settings_json"], "noise_multiplier": 1.0}))


@given(data=st.data())
def test_any_scheme_with_any_setting_is_a_named_fault(data, tables, bounded):
    table = data.draw(st.sampled_from(SCHEME_TABLES).flatmap(tables))
    with bounded(50_000_000), contextlib.suppress(FedpeftError):
        work(scheme_json=json.dumps(table)).up  # noqa: B018 - computed


@given(sites=st.integers(0, 2**32 - 1), reach=st.floats(), number=st.integers(0, 2**32 - 1))
@example(sites=1, reach=5e-324, number=0)  # its step would be 0
@example(sites=2**29, reach=1.7e308, number=0)  # its step would be infinite
def test_any_grid_is_a_grid_or_an_update_error(sites, reach, number):
    with contextlib.suppress(UpdateError):
        grid = work(grid_sites=sites, grid_reach=reach, task_round=number).grid  # type: ignore[attr-defined]
        assert grid.step > 0
        assert grid.limit >= 0


def test_a_plan_that_claims_any_size_allocates_nothing(bounded):
    table = SPEC.to_json()
    for row in table["layout"]:
        row["shape"] = [2**40 for _ in row["shape"]]
    with bounded(20_000_000), contextlib.suppress(FedpeftError):
        assert work(spec_json=json.dumps(table)).up.size > 2**80  # type: ignore[attr-defined]


@given(data=st.data())
def test_any_file_of_peers_is_read_or_a_storage_error(data, tables, spoilt, tmp_path_factory):
    table = {"a": "ab" * 32, "b": "cd" * 32}
    path = tmp_path_factory.mktemp("peers") / "peers.json"
    garbled = tables(table).map(lambda one: json.dumps(one).encode())
    path.write_bytes(data.draw(st.one_of(spoilt(json.dumps(table).encode()), garbled, st.sampled_from(HOSTILE).map(str.encode))))
    with contextlib.suppress(StorageError):
        assert all(isinstance(part, str) for pair in Peers(path, {}).known().items() for part in pair)
