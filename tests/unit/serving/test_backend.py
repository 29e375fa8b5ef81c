"""A backend over a registry: labels, choices and embeddings of mixed batches are those of one adapter at a time; versions are swapped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.adapters import Adapter, attach, initial, make_spec
from fedpeft.bases import BaseSpec, HeadSpec, load_base
from fedpeft.config import describe
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS
from fedpeft.mixtures import Bank, Gates
from fedpeft.mixtures.routers import routed
from fedpeft.registry import Manifest, Registry, router_card
from fedpeft.routing import derive
from fedpeft.routing.cardfile import lora_modules
from fedpeft.routing.policies import token_router
from fedpeft.serving import ClosedError, End, Failed, Limits, OverloadedError, Piece, Request, Sampling
from fedpeft.serving.backend import Backend
from fedpeft.tasks import TASKS
from fedpeft.tensors import Tensors

TEXTS = ["open the file", "a much longer text about many other things that pads the rest", "", "sort by a key"]
LABELS = {"two": ("yes", "no"), "four": ("north", "south", "east", "west"), "three": ("a", "b", "c")}
KINDS = {"two": ("lora", {"r": 4}), "four": ("ia3", {}), "three": ("lora", {"r": 2, "targets": ("all",)})}


def moved(base: Any, task: Any, kind: str, seed: int, **settings: Any) -> Adapter:
    spec = make_spec(task.name, base, METHODS[kind](**settings), task.head)
    noise = np.random.default_rng(seed).normal(0, 0.1, spec.layout.size)
    return Adapter(spec, Tensors(spec.layout, (initial(base, spec, seed).tensors.flat + noise).astype(np.float32)))


def publish(store: Registry, base: Any, task: Any, kind: str, seed: int, **settings: Any) -> Adapter:
    adapter = moved(base, task, kind, seed, **settings)
    store.publish(adapter, Manifest(task_settings=describe(task)), origin=f"{task.name}/{seed}")
    return adapter


def expected(base: Any, adapter: Adapter, text: str) -> np.ndarray:
    ids = base.tokenizer(text, truncation=True, max_length=base.spec.max_tokens)["input_ids"] or [base.tokenizer.pad_token_id]
    with attach(base, adapter.spec) as live, torch.no_grad():
        live.load(adapter.tensors)
        logits = live.model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits
    return logits[0].softmax(0).numpy()


@pytest.mark.parametrize("model", [pytest.param("minilm", marks=pytest.mark.slow), "stories260k"])
def test_labels_of_different_tasks_come_from_one_mixed_batch_as_from_each_alone(shared_models, tmp_path, model):
    spec = BaseSpec(model if model == "minilm" else str(shared_models / model), max_tokens=64)
    free, store = load_base(spec, "cpu"), Registry(tmp_path / "registry")
    own = {}
    for seed, (name, labels) in enumerate(LABELS.items()):
        kind, settings = KINDS[name]
        own[name] = publish(store, free, TASKS["classification"](name, labels), kind, seed, **settings)
    with Backend(load_base(spec, "cpu"), store, Limits()) as backend:
        backend.catalog.refresh()
        asked = [(name, text) for text in TEXTS for name in LABELS]
        futures = [
            backend.classify(backend.read(backend.ids, text).result(), backend.catalog.take({name: 1.0}), LABELS[name])
            for name, text in asked
        ]
        embedded = [backend.embed(backend.read(backend.ids, text).result(), {}) for text in TEXTS]
        for (name, text), future in zip(asked, futures, strict=True):
            assert np.allclose(list(future.result().values()), expected(free, own[name], text), atol=2e-5)
            assert tuple(future.result()) == LABELS[name]
        assert np.allclose([vector.result() for vector in embedded], free.embed(TEXTS), atol=2e-5)


@pytest.fixture
def stories(shared_models):
    return lambda: load_base(BaseSpec(str(shared_models / "stories260k"), max_tokens=128), "cpu")


def test_a_choice_is_what_the_task_itself_says(stories, tmp_path):
    free, store = stories(), Registry(tmp_path / "registry")
    task = TASKS["choice"]("pick")
    adapter = publish(store, free, task, "lora", 1, r=4)
    text = "the cat sat on\n- the mat\n- a purple elephant of great size\n- it"
    with attach(free, adapter.spec) as live:
        live.load(adapter.tensors)
        want = task.answer(live.model, free, text)
    with Backend(stories(), store, Limits()) as backend:
        backend.catalog.refresh()
        assert backend.answer(text, backend.catalog.take({"pick": 1.0}), task).result() == want
        fault = backend.answer("no list", backend.catalog.take({"pick": 1.0}), task).result()
        assert "list of choices" in str(fault)


def test_a_version_in_use_stays_until_its_last_request_has_ended(stories, tmp_path):
    free, store = stories(), Registry(tmp_path / "registry")
    task = TASKS["generation"]("say")
    publish(store, free, task, "lora", 1, r=4)
    with Backend(stories(), store, Limits()) as backend:
        catalog = backend.catalog
        assert catalog.refresh() == ["say@1"]
        assert catalog.refresh() == []
        held = catalog.take({"say": 1.0})
        publish(store, free, task, "lora", 2, r=8)
        assert catalog.refresh() == ["say@2"]
        assert catalog.find("say").name == "say@2"
        catalog.sweep()
        assert set(backend._bank.names) == {"say@1", "say@2"}
        events: list[Any] = []
        backend.submit(Request((5, 6), held, Sampling(max_tokens=3, temperature=0.0, endless=True), events.append))
        backend.engine.call(lambda: None)
        while not events or not isinstance(events[-1], End):
            backend.engine.call(lambda: None)
        assert sum(isinstance(event, Piece) for event in events) == 3
        catalog.sweep()
        assert backend._bank.names == ("say@2",)
        assert (catalog.swaps.loaded, catalog.swaps.retired) == (2, 1)
        store.rollback("say", "say@1")
        assert catalog.refresh() == ["say@3"]


@pytest.mark.parametrize("kind", ["gate", "arrow", "spectr"])
def test_tokens_weigh_adapters_anew_in_a_mixed_batch_as_in_a_forward_of_their_own(stories, tmp_path, kind):
    free, store = stories(), Registry(tmp_path / "registry")
    for seed, name in enumerate(("a", "b", "c")):
        adapter, gates = moved(free, TASKS["generation"](name), "lora", seed, r=4), np.random.default_rng(seed)
        own = {module: gates.normal(size=size).astype(np.float32) for module, size in lora_modules(adapter.spec.layout).items()}
        manifest = Manifest(task_settings=describe(TASKS["generation"](name)))
        store.publish(adapter, manifest, origin=name, router=derive(adapter.tensors, gates=own))
    rows = [[5, 9, 11, 40, 8], [7, 301, 20], [5, 9, 11, 40, 8], [6, 12, 13, 14]]
    with Backend(stories(), store, Limits()) as backend:
        backend.catalog.refresh()
        mixture = backend.catalog.take({"a": 0.5, "b": 0.5, "c": 0.0})
        weighed = backend.weighed(mixture, kind)
        assert dict(weighed) == mixture
        assert backend.weighed(mixture, kind).gates is weighed.gates

        def mixed() -> Any:
            decoder = backend._scheduler.rows
            seats = [decoder.open(one) for one in (weighed, mixture, {}, weighed)]
            decoder.forward([(seat, row[:-1]) for seat, row in zip(seats, rows, strict=True)])
            return decoder.forward([(seat, row[-1:]) for seat, row in zip(seats, rows, strict=True)])

        found = backend.engine.call(mixed)
    router = token_router(kind, {f"{name}@1": router_card(store, name) for name in "abc"})
    with Bank.attach(free, HeadSpec("lm"), {f"{name}@1": store.load(name) for name in "abc"}) as bank, torch.no_grad():
        plain = Gates.weights(["a@1", "b@1"], torch.tensor([[0.5, 0.5]]))
        for row, gates, logits in zip(rows, (routed(router), plain, Gates(), routed(router)), found, strict=True):
            bank.use(gates)
            want = bank.model(input_ids=torch.tensor([row])).logits[0, -1].numpy()
            np.testing.assert_allclose(logits, want, atol=1e-5 * np.abs(want).max())
        bank.use(plain)
        means = bank.model(input_ids=torch.tensor([rows[0]])).logits[0, -1].numpy()
    assert np.abs(found[0] - means).max() > 1e-3 * np.abs(means).max()  # or whole requests would do


def test_what_cannot_be_served_is_named_and_another_task_is_not_hurt(stories, tmp_path):
    free, store = stories(), Registry(tmp_path / "registry")
    publish(store, free, TASKS["generation"]("good"), "lora", 1, r=4)
    publish(store, free, TASKS["generation"]("bad"), "prefix", 1, tokens=3)
    with Backend(stories(), store, Limits()) as backend:
        assert backend.catalog.refresh() == ["good@1"]
        with pytest.raises(AdapterError, match="prefix adds virtual tokens"):
            backend.catalog.find("bad")
        with pytest.raises(AdapterError, match=r"tasks are \['good'\]"):
            backend.catalog.find("none")


def test_a_full_queue_and_a_closed_engine_say_so_and_hold_nothing(stories, tmp_path):
    store = Registry(tmp_path / "registry")
    publish(store, stories(), TASKS["generation"]("say"), "lora", 1, r=4)
    backend = Backend(stories(), store, Limits(rows=1, queue=1))
    backend.catalog.refresh()
    events: list[Any] = []

    def request() -> Request:
        return Request((5,), backend.catalog.take({"say": 1.0}), Sampling(max_tokens=100, endless=True), events.append)

    for _ in range(2):
        backend.submit(request())
    over = request()
    with pytest.raises(OverloadedError):
        backend.submit(over)
    backend.close()
    assert sum(isinstance(event, Failed) for event in events) == 2
    with pytest.raises(ClosedError):
        backend.submit(request())
    assert set(backend.catalog._uses.values()) == {0}


def test_nothing_waits_for_an_engine_that_has_stopped(stories, tmp_path):
    backend = Backend(stories(), Registry(tmp_path / "registry"), Limits())
    backend.close()
    with pytest.raises(ClosedError):
        backend.engine.call(lambda: None)
    with pytest.raises(ClosedError):
        backend.embed((5,), {})
    with pytest.raises(ClosedError):
        backend.read(backend.ids, "x")
    backend.close()


def test_a_failing_model_ends_its_requests_and_is_reported(stories, tmp_path, monkeypatch):
    store = Registry(tmp_path / "registry")
    publish(store, stories(), TASKS["generation"]("say"), "lora", 1, r=4)
    with Backend(stories(), store, Limits()) as backend:
        backend.catalog.refresh()
        events: list[Any] = []
        forward = backend._scheduler.rows.forward

        def broken(work: Any) -> Any:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(backend._scheduler.rows, "forward", broken)
        for _ in range(5):
            before = len(events)
            backend.submit(Request((5,), {}, Sampling(max_tokens=3), events.append))
            while len(events) == before:
                backend.engine.call(lambda: None)
        assert all(isinstance(event, Failed) and "RuntimeError" in event.message for event in events)
        assert not backend.engine.healthy
        with pytest.raises(ClosedError, match="last 5 steps failed"):
            backend.submit(Request((5,), {}, Sampling(), events.append))
        monkeypatch.setattr(backend._scheduler.rows, "forward", forward)
