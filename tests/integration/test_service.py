"""A registry answers: routed requests, named tasks, scored rows; and every way it can be wrong is one named fault."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading

import numpy as np
import pytest

from fedpeft.adapters import initial, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.cli.main import run
from fedpeft.config import build, describe
from fedpeft.errors import AdapterError, BaseError, ConfigError, DataError
from fedpeft.methods import METHODS
from fedpeft.registry import Manifest, Registry
from fedpeft.routing import Card
from fedpeft.routing.learned import BIAS
from fedpeft.service import Service
from fedpeft.tasks import Classification
from fedpeft.tensors import Tensors

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
    service = Service.open(registry)
    assert service.route("a horse and a cow on the farm with a dog").task == "animals"
    assert service.route("the price of shares and bank interest").task == "money"
    assert service.route("quantum chromodynamics on a lattice").task is None
    assert service.route("anything at all", "money").task == "money"
    answer = service.answer("the bank pays", service.route("the bank pays", "money"))
    assert any(label in answer for label in LABELS["money"])


def test_rows_are_scored_with_and_without_routing(registry):
    rows = [{"task": name, "text": text, "label": LABELS[name][0]} for name, texts in TEXTS.items() for text in texts]
    service = Service.open(registry)
    routed, named = service.evaluate(rows), service.evaluate(rows, None)
    assert {name: report["rows"] for name, report in routed.items()} == {"animals": 3, "money": 3}
    assert all(report["routed right"] >= 2 / 3 for report in routed.values())
    assert all(report["routed right"] == 1.0 for report in named.values())
    assert all(0.0 <= report["scores"]["accuracy"] <= 1.0 for report in named.values())


def test_the_control_plane_routes_texts_as_the_service_does(registry):
    from fedpeft.routing import make_router
    from fedpeft_coordinator.control.router import Served, Texts

    service, served, texts = Service.open(registry), Served().renewed(registry, 1), Texts(registry)
    for text in ("a horse and a cow on the farm with a dog", "the price of shares", "quantum chromodynamics on a lattice"):
        assert make_router("chain", served.cards).route(texts(served, text)) == service.route(text)
    version = registry.get("money")
    registry.publish(registry.load("animals"), Manifest(round=9, task_settings=version.manifest.task_settings), "new")
    later = served.renewed(registry, 2)
    assert later.cards["money"] is served.cards["money"], "what is served still is not read again"
    assert later.cards["animals"] is not served.cards["animals"]
    assert make_router("chain", later.cards).route(texts(later, "the price of shares")).task == "money"


def test_every_router_says_what_it_chose_and_why(registry):
    service, text = Service.open(registry), "the bank raised its interest rate"
    for kind in ("chain", "centroid", "centroid3", "cluster"):
        route = service.route(text, router=kind)
        assert (route.task, route.router) == ("money", kind if kind == "cluster" else "centroid")
        assert "money" in route.why
    assert service.route(text, router="mean").weights == {"animals": 0.5, "money": 0.5}
    with pytest.raises(AdapterError, match=r"router gate: none of \['animals', 'money'\] has gates"):
        service.router("gate")
    with pytest.raises(AdapterError, match="router arrow: none of"):
        service.router("arrow")  # adapters of round 0 stretch no direction
    with pytest.raises(AdapterError, match="router 'psychic' is not known"):
        service.router("psychic")


def test_a_router_over_tokens_reads_the_base(registry, base):
    for name in TEXTS:
        adapter = registry.load(name)
        drawn = np.random.default_rng(len(name)).standard_normal(adapter.tensors.flat.size).astype(np.float32)
        moved = dataclasses.replace(adapter, tensors=Tensors(adapter.spec.layout, adapter.tensors.flat + 0.01 * drawn))
        registry.publish(moved, registry.get(name).manifest, origin=f"moved/{name}")
    service = Service.open(registry)
    for kind in ("arrow", "spectr"):
        route = service.route("a dog barks", router=kind)
        assert route.level == "token"
        assert sum(route.weights.values()) == pytest.approx(1.0, abs=1e-5)
        assert all(0 <= score <= 1 for score in route.scores.values())
        assert service.answer("a dog barks", route)
        report = service.evaluate([{"task": "money", "text": text, "label": "gain"} for text in TEXTS["money"]], kind)["money"]
        assert report["scored"] == round(3 * report["routed right"])
    named, told = service.request("a dog barks"), service.base.watch("a dog barks", ["bert.encoder.layer.0.attention.self.query"])
    assert set(told) < set(named.states)
    assert all(np.array_equal(named.states[module], values) for module, values in told.items())


def test_a_trained_router_weighs_the_adapters_that_are_served(registry, base):
    method = build(METHODS, {"kind": "xlora", "experts": ["animals", "money"], "r": 2}, "method")
    task = Classification("both", LABELS["money"])
    start = initial(base, make_spec("both", base, method, task.head), 3)
    bias = next(view for name, view in start.tensors.named().items() if name.endswith(BIAS))
    bias.reshape(-1, 2)[:, 1] = 1.0
    registry.publish(start, Manifest(task_settings=describe(task)), origin="test/both")
    service = Service.open(registry)
    route = service.route("a dog barks", router="xlora")
    share = 1 / (1 + np.exp(-1.0))
    assert route.weights == {"animals": pytest.approx(1 - share, abs=1e-6), "money": pytest.approx(share, abs=1e-6)}
    assert (route.task, route.level) == ("money", "sequence")
    assert any(label in service.answer("a dog barks", route) for label in LABELS["money"])
    cards = {name: card for name, card in service.cards.items() if name != "animals"}
    with pytest.raises(AdapterError, match=r"router xlora: none of .* has a trained router over adapters that are all served"):
        dataclasses.replace(service, cards=cards).router("xlora")


def test_cards_of_another_encoder_are_embedded_by_it_and_not_mixed(registry, base):
    service = Service.open(registry)
    alien = {
        name: dataclasses.replace(card, card=dataclasses.replace(card.card, encoder="minilm@" + "0" * 64))
        for name, card in service.cards.items()
    }
    with pytest.raises(BaseError, match="router cards were made with minilm 000000"):
        dataclasses.replace(service, cards=alien).route("a dog")
    same = {
        name: dataclasses.replace(card, card=dataclasses.replace(card.card, encoder=f"minilm@{base.fingerprint.identity}"))
        for name, card in service.cards.items()
    }
    assert dataclasses.replace(service, cards=same).route(TEXTS["animals"][0]).task == "animals"
    with pytest.raises(AdapterError, match="make all cards with one encoder"):
        dataclasses.replace(service, cards={"animals": same["animals"], "money": alien["money"]}).route("a dog")


def test_a_row_of_no_known_task_is_named(registry):
    with pytest.raises(DataError, match=r"row 1: task 'plants'.*animals"):
        Service.open(registry).evaluate([{"task": "plants", "text": "a rose", "label": "red"}])


def test_an_unknown_task_is_named(registry):
    with pytest.raises(AdapterError, match="plants"):
        Service.open(registry).route("a rose", "plants")


def test_another_base_is_refused(tmp_path, base, registry):
    adapter = registry.load("money")
    other = dataclasses.replace(adapter, spec=dataclasses.replace(adapter.spec, base="0" * 64))
    foreign = Registry(tmp_path / "foreign")
    foreign.publish(other, Manifest(task_settings=describe(Classification("money", LABELS["money"]))), origin="x")
    with pytest.raises(BaseError, match="trained on base 000000"):
        Service.open(foreign)


def test_an_empty_registry_says_so(tmp_path):
    with pytest.raises(AdapterError, match="no version"):
        Service.open(Registry(tmp_path / "empty"))


def test_a_new_task_starts_near_what_its_rows_are_like(registry, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{text}", "label": "a"}}\n' for text in TEXTS["money"] * 2))
    (tmp_path / "site.toml").write_text('name = "s"\n[base]\nmodel = "minilm"\n[data.shares]\npath = "rows.jsonl"\n')
    (tmp_path / "f.toml").write_text('name = "f"\n[tasks.shares]\nkind = "classification"\nlabels = ["a", "b"]\n')
    asked = ["client", "start", str(tmp_path / "site.toml"), "--plan", str(tmp_path / "f.toml"), "--registry", str(registry.root)]
    assert run([*asked, "--task", "shares"]) == 0
    told = capsys.readouterr().out
    assert 'start = { kind = "mixture", adapters = { "money" = 1.000 } }' in told
    assert run([*asked, "--task", "shares", "--fit"]) == AdapterError.exit_code
    assert "no served adapter knows its labels" in capsys.readouterr().err
    assert run([*asked, "--task", "bonds"]) == ConfigError.exit_code


@pytest.fixture
def far(registry, base, tmp_path, monkeypatch):
    """A control plane over ``registry`` that reads texts, and its address; nothing loads the base anew."""
    from fedpeft_coordinator.control.config import Control
    from fedpeft_coordinator.control.serve import Server

    monkeypatch.setattr("fedpeft.bases.load_base", lambda *_spec: base)
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = Server(registry, Control(port=0, poll=0.05), tmp_path / "state")
    yield f"grpc://127.0.0.1:{asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)}"
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_verbs_say_the_same_of_a_far_registry(registry, far, tmp_path, capsys):
    def said(*verb: str) -> dict[str, object]:
        assert run([*verb, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    text = "the bank pays the invoice"
    near = said("route", text, "--registry", str(registry.root))
    assert (near["task"], near["router"]) == ("money", "centroid")
    assert said("route", text, "--registry", far) == near
    pulled = {path.parent.name for path in (tmp_path / "cache").glob("objects/*/manifest.json")}
    assert pulled == {registry.resolve("money")}, "router cards are read without the adapters"
    there = said("route", text, "--registry", far, "--router", "there")
    assert there == {**near, "answer": None}
    assert said("route", text, "--registry", far, "--router", "there:mean")["weights"] == {"animals": 0.5, "money": 0.5}
    rows = [{"task": name, "text": text, "label": LABELS[name][0]} for name, texts in TEXTS.items() for text in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = said("evaluate", str(tmp_path / "rows.jsonl"), "--registry", far)
    assert report == said("evaluate", str(tmp_path / "rows.jsonl"), "--registry", str(registry.root))
    assert set(report) == {"animals", "money"}
