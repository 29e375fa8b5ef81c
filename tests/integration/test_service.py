"""A registry answers: routed requests, named tasks, scored rows; and every way it can be wrong is one named fault."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedpeft.adapters import initial, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.config import build, describe
from fedpeft.errors import AdapterError, BaseError, DataError
from fedpeft.methods import METHODS
from fedpeft.registry import Manifest, Registry
from fedpeft.routing import Card
from fedpeft.service import Service
from fedpeft.tasks import Classification

pytestmark = pytest.mark.integration

TEXTS = {
    "animals": ["the cat sleeps on the mat", "a dog barks at the cat", "two birds sing in a tree"],
    "money": ["the bank raised its interest rate", "stocks fell on the exchange", "pay the invoice by card"],
}
LABELS = {"animals": ("pet", "wild"), "money": ("gain", "loss")}


@pytest.fixture(scope="module")
def base():
    return load_base(BaseSpec("minilm"))


@pytest.fixture
def registry(tmp_path, base):
    store = Registry(tmp_path / "registry")
    for name, texts in TEXTS.items():
        task = Classification(name, LABELS[name])
        spec = make_spec(name, base, build(METHODS, {"kind": "lora", "r": 2}, "method"), task.head)
        centroid = base.embed(texts).sum(axis=0)
        unit = centroid.astype(np.float64) / np.linalg.norm(centroid)
        card = Card(tuple(unit.tolist()), 0.2, len(texts)).to_json()
        store.publish(initial(base, spec, 3), Manifest(task_settings=describe(task), card=card), origin=f"test/{name}")
    return store


def test_a_request_goes_to_its_task_and_a_stranger_to_the_base(registry):
    service = Service.open(registry.root)
    assert service.route("a horse and a cow on the farm with a dog").task == "animals"
    assert service.route("the price of shares and bank interest").task == "money"
    assert service.route("quantum chromodynamics on a lattice").task is None
    assert service.route("anything at all", "money").task == "money"
    answer = service.answer("the bank pays", "money")
    assert any(label in answer for label in LABELS["money"])


def test_rows_are_scored_with_and_without_routing(registry):
    rows = [{"task": name, "text": text, "label": LABELS[name][0]} for name, texts in TEXTS.items() for text in texts]
    service = Service.open(registry.root)
    routed, named = service.evaluate(rows), service.evaluate(rows, routed=False)
    assert {name: report["rows"] for name, report in routed.items()} == {"animals": 3, "money": 3}
    assert all(report["routed right"] >= 2 / 3 for report in routed.values())
    assert all(report["routed right"] == 1.0 for report in named.values())
    assert all(0.0 <= report["scores"]["accuracy"] <= 1.0 for report in named.values())


def test_a_row_of_no_known_task_is_named(registry):
    with pytest.raises(DataError, match=r"row 1: task 'plants'.*animals"):
        Service.open(registry.root).evaluate([{"task": "plants", "text": "a rose", "label": "red"}])


def test_an_unknown_task_is_named(registry):
    with pytest.raises(AdapterError, match="plants"):
        Service.open(registry.root).route("a rose", "plants")


def test_another_base_is_refused(tmp_path, base, registry):
    adapter = registry.load("money")
    other = dataclasses.replace(adapter, spec=dataclasses.replace(adapter.spec, base="0" * 64))
    foreign = Registry(tmp_path / "foreign")
    foreign.publish(other, Manifest(task_settings=describe(Classification("money", LABELS["money"]))), origin="x")
    with pytest.raises(BaseError, match="trained on base 000000"):
        Service.open(foreign.root)


def test_an_empty_registry_says_so(tmp_path):
    with pytest.raises(AdapterError, match="no registry"):
        Service.open(tmp_path / "absent")
    Registry(tmp_path / "empty")
    (tmp_path / "empty").mkdir(exist_ok=True)
    with pytest.raises(AdapterError, match="no version"):
        Service.open(tmp_path / "empty")
