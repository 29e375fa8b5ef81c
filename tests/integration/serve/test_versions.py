"""Versions and routers that change while they are served, and those that cannot be."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from tests.integration.serve.asking import PROMPT, TEXTS, Api, noisy, publish, streamed, wait

from fedpeft.adapters import initial, make_spec
from fedpeft.bases import HeadSpec
from fedpeft.config import describe
from fedpeft.methods import METHODS
from fedpeft.mixtures import Bank
from fedpeft.mixtures.routers import routed
from fedpeft.registry import Manifest, Registry, router_card
from fedpeft.routing.learned import BIAS
from fedpeft.routing.policies import token_router
from fedpeft.tasks import Generation

pytestmark = pytest.mark.integration


def test_versions_are_swapped_under_load_without_a_dropped_request(serving, fresh, base, tmp_path):
    store = Registry(tmp_path / "registry")
    publish(store, base, Generation("cats"), 0, "swap/0", texts=[PROMPT["content"]] * 8)
    card = store.get("cats").manifest.card
    versions = 5
    adapters = {1: store.load("cats")}
    api = serving(fresh(), store.root, watch_seconds=0.05)
    answers: list[tuple[str, str]] = []
    done = threading.Event()

    def ask(model: str, stream: bool) -> None:
        with httpx.Client(base_url=api.url, timeout=60) as http:
            one = Api(api.backend, http, api.url)
            body = {"temperature": 0, "max_tokens": 24, "logit_bias": {}}
            while not done.is_set():
                if stream:
                    chunks = streamed(one, model=model, **body)
                    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
                    answers.append((next(iter(chunks[0]["fedpeft"]["mixture"])), text))
                else:
                    found = one.chat(model, **body)
                    answers.append((next(iter(found["fedpeft"]["mixture"])), found["choices"][0]["message"]["content"]))

    ways = [("task:cats", False), ("task:cats", True), ("auto", False), ("auto", True)]
    callers = [threading.Thread(target=ask, args=way) for way in ways]
    for caller in callers:
        caller.start()
    try:
        for number in range(2, versions + 1):
            seen = len(answers)
            store.publish(
                noisy(base, Generation("cats"), number),
                Manifest(task_settings=describe(Generation("cats")), card=card),
                origin=f"swap/{number}",
            )
            adapters[number] = store.load(f"cats@{number}")
            wait(lambda: api.http.get("/v1/models/task:cats").json()["fedpeft"]["version"] == f"cats@{number}")  # noqa: B023
            wait(lambda: len(answers) > seen + 6)  # noqa: B023
    finally:
        done.set()
        for caller in callers:
            caller.join()
    wait(lambda: api.backend.catalog.swaps.retired == versions - 1)
    assert api.backend._bank.names == (f"cats@{versions}",)
    by_version: dict[str, set[str]] = {}
    for name, text in answers:
        by_version.setdefault(name, set()).add(text)
    assert set(by_version) == {f"cats@{number}" for number in adapters}
    assert all(len(texts) == 1 for texts in by_version.values()), "one version said two things"
    assert len({next(iter(texts)) for texts in by_version.values()}) == versions


def test_a_router_over_tokens_is_asked_by_every_token_beside_callers_of_one_task(serving, fresh, base, alone, tmp_path):
    from fedpeft.tasks.encoding import prompt_ids
    from fedpeft.tasks.greedy import generate

    store, names = Registry(tmp_path / "registry"), [f"{name}@1" for name in TEXTS]
    for seed, name in enumerate(TEXTS):
        publish(store, base, Generation(name), seed, f"tokens/{name}")
    api = serving(fresh(), store.root, router="spectr")
    router = token_router("spectr", {name: router_card(store, name) for name in names})
    with Bank.attach(base, HeadSpec("lm"), {name: store.load(name) for name in names}) as bank:
        bank.use(routed(router))
        want = generate(bank.model, base, [np.array(prompt_ids(base, [PROMPT]), np.int32)], 12)[0]
    assert want not in alone.values()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(api.chat, model, temperature=0, max_tokens=12) for model in ("auto", "task:cats", "auto")]
        found, cats, again = (one.result() for one in asked)
    for one in (found, again):
        assert one["choices"][0]["message"]["content"].strip() == want
        assert set(one["fedpeft"]["mixture"]) == set(names)
        assert (one["fedpeft"]["route"]["kind"], one["fedpeft"]["route"]["level"]) == ("spectr", "token")
    assert cats["choices"][0]["message"]["content"].strip() == alone["cats"]


def test_a_trained_router_of_a_version_that_cannot_be_served_routes_to_those_that_are(serving, fresh, base, tmp_path):
    store = Registry(tmp_path / "registry")
    for seed, name in enumerate(TEXTS):
        publish(store, base, Generation(name), seed, f"learned/{name}")
    spec = make_spec("both", base, METHODS["xlora"](experts=tuple(TEXTS), r=4, targets=("all",)), Generation("both").head)
    adapter = initial(base, spec, 0)
    bias = next(view for name, view in adapter.tensors.named().items() if name.endswith(BIAS))
    bias.reshape(-1, 2)[:, 1] = 1.0
    store.publish(adapter, Manifest(task_settings=describe(Generation("both"))), origin="learned/both")
    api = serving(fresh(), store.root, router="xlora")
    found = api.chat("auto", temperature=0, max_tokens=4)["fedpeft"]
    share = 1 / (1 + np.exp(-1.0))
    assert found["mixture"] == {"cats@1": pytest.approx(1 - share, abs=1e-6), "ships@1": pytest.approx(share, abs=1e-6)}
    assert found["route"]["kind"] == "xlora"
    assert "xlora" in api.backend.catalog.faults["both"]


def test_a_version_that_cannot_be_served_leaves_the_old_one_at_work(serving, fresh, base, tmp_path):
    store = Registry(tmp_path / "registry")
    publish(store, base, Generation("cats"), 0, "bad/0")
    api = serving(fresh(), store.root, watch_seconds=0.05)
    spec = make_spec("cats", base, METHODS["prompt"](tokens=4), Generation("cats").head)
    store.publish(initial(base, spec, 0), Manifest(task_settings=describe(Generation("cats"))), origin="bad/1")
    wait(lambda: api.backend.catalog.swaps.refused == 1)
    assert "prompt adds virtual tokens" in api.backend.catalog.faults["cats"]
    assert api.http.get("/v1/models/task:cats").json()["fedpeft"]["version"] == "cats@1"
    assert api.chat("task:cats", max_tokens=2)["fedpeft"]["mixture"] == {"cats@1": 1.0}
