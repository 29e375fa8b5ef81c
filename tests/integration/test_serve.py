"""The site's API over HTTP on loopback: stories260k, several adapters at once, every way a caller can be right or wrong."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from fedpeft.adapters import Adapter, attach, initial, make_spec
from fedpeft.bases import BaseSpec, HeadSpec, load_base
from fedpeft.config import describe
from fedpeft.methods import METHODS, Lora
from fedpeft.mixtures import Bank
from fedpeft.mixtures.routers import routed
from fedpeft.registry import Manifest, Registry, router_card
from fedpeft.routing import make_card
from fedpeft.routing.cards import centroid, histogram
from fedpeft.routing.learned import BIAS
from fedpeft.routing.policies import token_router
from fedpeft.tasks import Classification, Generation
from fedpeft.tensors import Tensors
from fedpeft_client.serve.run import opened, server
from fedpeft_client.serve.settings import Serve

pytestmark = pytest.mark.integration

TEXTS = {
    "cats": ["the cat sat on the mat", "a kitten plays with a ball", "cats like milk and fish"],
    "ships": ["the ship sails over the sea", "a boat in the harbour", "the captain and his crew"],
}
PROMPT = {"role": "user", "content": "Once upon a time there was a little cat"}


@dataclass
class Api:
    """A running server and a client of it."""

    backend: object
    http: httpx.Client
    url: str

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    def chat(self, model: str, **body: object) -> dict:
        found = self.post("/v1/chat/completions", model=model, messages=[PROMPT], **body)
        assert found.status_code == 200, found.text
        return found.json()


def noisy(base, task, seed: int, method=None, scale: float = 0.3) -> Adapter:
    """An adapter of random values that changes what the base says."""
    spec = make_spec(task.name, base, method or Lora(r=4, targets=("all",)), task.head)
    values = np.random.default_rng(seed).normal(scale=scale / 4, size=spec.layout.size).astype(np.float32)
    return Adapter(spec, Tensors(spec.layout, values))


def publish(registry: Registry, base, task, seed: int, origin: str, texts=(), scale: float = 0.3) -> None:
    card = None
    if texts:
        vectors = base.embed(list(texts))
        direction = centroid(vectors.sum(0), len(texts))
        card = make_card(vectors.sum(0), len(texts), histogram(vectors, direction), encoder=base.encoder).to_json()
    registry.publish(noisy(base, task, seed, scale=scale), Manifest(task_settings=describe(task), card=card), origin=origin)


@pytest.fixture(scope="module")
def fresh(shared_models):
    """Loads the base anew: a served one carries its mixture."""
    return lambda: load_base(BaseSpec(str(shared_models / "stories260k"), max_tokens=256))


@pytest.fixture(scope="module")
def base(fresh):
    """A base that no server takes."""
    return fresh()


@pytest.fixture(scope="module")
def serving():
    """Start servers on free ports; all are stopped at the end."""
    running = []

    def start(base, registry: Path | str, **settings: object) -> Api:
        chosen = Serve(registry=str(registry), **{"patience_seconds": 1.0, "watch_seconds": 0.1, **settings})
        listener = socket.create_server((chosen.host, 0))
        backend = opened(chosen, base)
        web = server(chosen, backend)
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://{chosen.host}:{listener.getsockname()[1]}"
        api = Api(backend, httpx.Client(base_url=url, timeout=60), url)
        while True:
            try:
                api.http.get("/healthz")
                break
            except httpx.TransportError:
                time.sleep(0.02)
        running.append((web, thread, backend, listener, api))
        return api

    yield start
    for web, thread, backend, listener, api in reversed(running):
        api.http.close()
        web.should_exit = True
        thread.join()
        backend.close()
        listener.close()


@pytest.fixture(scope="module")
def registry(tmp_path_factory, base):
    store = Registry(tmp_path_factory.mktemp("serve") / "registry")
    for seed, (name, texts) in enumerate(TEXTS.items()):
        publish(store, base, Generation(name), seed, f"test/{name}", texts)
    publish(store, base, Classification("mood", ("glad", "sad", "calm")), 7, "test/mood")
    return store.root


@pytest.fixture(scope="module")
def alone(base, registry):
    """Each task's own greedy answer to `PROMPT` (12 tokens), one adapter attached, by the platform's own generation."""
    from fedpeft.tasks.encoding import prompt_ids
    from fedpeft.tasks.greedy import generate

    said = {}
    for name in TEXTS:
        adapter = Registry(registry).load(name)
        with attach(base, adapter.spec) as live:
            live.load(adapter.tensors)
            said[name] = generate(live.model, base, [np.array(prompt_ids(base, PROMPT["content"]), np.int32)], 12)[0]
    said["base"] = generate(base.shell(HeadSpec("lm")), base, [np.array(prompt_ids(base, [PROMPT]), np.int32)], 12)[0]
    return said


@pytest.fixture(scope="module")
def api(serving, fresh, registry):
    return serving(fresh(), registry)


def test_every_model_answers_as_it_does_alone(api, alone):
    for model, want in [("task:cats", alone["cats"]), ("task:ships", alone["ships"]), ("base", alone["base"])]:
        found = api.chat(model, temperature=0, max_tokens=12)
        assert found["choices"][0]["message"]["content"].strip() == want
        assert found["object"] == "chat.completion"
        assert found["model"] == model
        assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"]
    assert len(set(alone.values())) == 3, "the adapters must say different things, or this proves nothing"


def test_many_callers_of_different_models_at_once_get_what_they_get_alone(api, alone):
    async def everyone() -> list[tuple[str, str]]:
        async with httpx.AsyncClient(base_url=api.url, timeout=60) as http:

            async def one(number: int) -> tuple[str, str]:
                name = ["cats", "ships", "base"][number % 3]
                await asyncio.sleep(0.004 * number)
                body = {"model": name if name == "base" else f"task:{name}", "messages": [PROMPT], "temperature": 0, "max_tokens": 12}
                found = (await http.post("/v1/chat/completions", json=body)).json()
                return name, found["choices"][0]["message"]["content"].strip()

            return await asyncio.gather(*(one(number) for number in range(24)))

    for name, said in asyncio.run(everyone()):
        assert said == alone[name]


def streamed(api: Api, path: str = "/v1/chat/completions", **body: object) -> list[dict]:
    asked = {"stream": True, **body} if "prompt" in body else {"messages": [PROMPT], "stream": True, **body}
    with api.http.stream("POST", path, json=asked) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_is_the_whole_answer_in_pieces(api):
    whole = api.chat("task:cats", temperature=0, max_tokens=12)
    chunks = streamed(api, model="task:cats", temperature=0, max_tokens=12, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[0]["fedpeft"]["mixture"] == {"cats@1": 1.0}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]][-1] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert len(chunks) > 4


def test_auto_is_routed_and_says_where_and_how(api):
    for name, texts in TEXTS.items():
        found = api.post("/v1/chat/completions", model="auto", messages=[{"role": "user", "content": texts[0]}], max_tokens=2)
        assert found.json()["fedpeft"]["route"]["task"] == name
        assert set(found.json()["fedpeft"]["route"]["scores"]) >= set(TEXTS)
        assert found.headers["x-fedpeft-mixture"].startswith(f"{name}@1=")


def test_auto_streams_and_completes_what_it_says_at_once(api):
    for name, texts in TEXTS.items():
        body = {"model": "auto", "temperature": 0, "max_tokens": 12}
        messages = [{"role": "user", "content": texts[0]}]
        whole = api.post("/v1/chat/completions", messages=messages, **body).json()
        chunks = streamed(api, messages=messages, **body)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole["choices"][0]["message"]["content"]
        assert chunks[0]["fedpeft"] == whole["fedpeft"]
        assert whole["fedpeft"]["route"]["task"] == name
        done = api.post("/v1/completions", prompt=texts[0], **body).json()
        pieces = streamed(api, "/v1/completions", prompt=texts[0], **body)
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == done["choices"][0]["text"] != ""
        assert done["fedpeft"]["mixture"] == pieces[0]["fedpeft"]["mixture"] == whole["fedpeft"]["mixture"]


def test_a_given_mixture_is_served_and_is_neither_of_its_parts(api):
    mixed = api.chat("auto", temperature=0, max_tokens=12, fedpeft={"mixture": {"cats": 0.5, "ships": 0.5}})
    assert mixed["fedpeft"]["mixture"] == {"cats@1": 0.5, "ships@1": 0.5}
    one = api.chat("auto", temperature=0, max_tokens=12, fedpeft={"mixture": {"cats": 1.0}})
    assert one["choices"] == api.chat("task:cats", temperature=0, max_tokens=12)["choices"]


def test_a_classification_task_answers_by_its_label(api, base, registry):
    found = api.chat("task:mood")
    scores = found["fedpeft"]["scores"]
    assert set(scores) == {"glad", "sad", "calm"}
    assert sum(scores.values()) == pytest.approx(1.0, abs=1e-5)
    assert found["choices"][0]["message"]["content"] == max(scores, key=scores.__getitem__)
    chunks = streamed(api, model="task:mood")
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == found["choices"][0]["message"]["content"]


def test_embeddings_are_the_bases_own(api, base):
    texts = [*TEXTS["cats"], "", "a much longer text than all of the others, so that rows are padded"]
    found = api.post("/v1/embeddings", model="base", input=texts).json()
    got = np.array([row["embedding"] for row in found["data"]])
    assert np.allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-5)
    coded = api.post("/v1/embeddings", model="base", input=texts, encoding_format="base64").json()
    raw = np.array([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in coded["data"]])
    assert np.allclose(raw, got, atol=1e-7)
    assert np.allclose(got, base.embed(texts), atol=1e-5)
    other = np.array(api.post("/v1/embeddings", model="task:cats", input=texts[0]).json()["data"][0]["embedding"])
    assert np.abs(other - got[0]).max() > 1e-3


def test_completions_take_texts_tokens_and_several_of_them(api, base):
    ids = base.tokenizer("Once upon a time")["input_ids"]
    ids = ids[:-1] if ids[-1] == base.tokenizer.eos_token_id else ids
    by_text = api.post("/v1/completions", model="base", prompt="Once upon a time", temperature=0, max_tokens=8).json()
    by_ids = api.post("/v1/completions", model="base", prompt=ids, temperature=0, max_tokens=8).json()
    assert by_text["choices"][0]["text"] == by_ids["choices"][0]["text"] != ""
    several = api.post("/v1/completions", model="base", prompt=["Once upon a time", "The dog"], temperature=0, max_tokens=8, n=2).json()
    assert [row["index"] for row in several["choices"]] == [0, 1, 2, 3]
    assert several["choices"][0]["text"] == several["choices"][1]["text"] == by_text["choices"][0]["text"]


def test_seeds_stops_and_log_probabilities(api):
    first, second = (api.chat("task:cats", temperature=1, seed=4, max_tokens=12) for _ in range(2))
    assert first["choices"] == second["choices"]
    whole = api.chat("base", temperature=0, max_tokens=20)["choices"][0]["message"]["content"]
    word = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = api.chat("base", temperature=0, max_tokens=20, stop=word)["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(word)]
    assert cut["finish_reason"] == "stop"
    told = api.chat("base", temperature=0, max_tokens=3, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert len(told) == 3
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0 for token in told)


def test_the_official_client_is_understood_and_understands(api, base, alone):
    openai = pytest.importorskip("openai", reason="the openai package, of the extra dev, is the client that most callers have")
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client:
        assert {model.id for model in client.models.list()} == {"base", "auto", "task:cats", "task:ships", "task:mood"}
        assert client.models.retrieve("task:cats").fedpeft["version"] == "cats@1"

        def chat(**body):
            return client.chat.completions.create(**{"model": "task:cats", "messages": [PROMPT], "temperature": 0, "max_tokens": 12} | body)

        whole = chat()
        assert whole.choices[0].message.content.strip() == alone["cats"]
        assert chat(messages=[PROMPT, whole.choices[0].message, PROMPT]).choices[0].message.role == "assistant"
        chunks = list(chat(stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
        assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
        assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
        several = chat(n=2, seed=5, temperature=1, max_tokens=None, max_completion_tokens=4, logprobs=True, top_logprobs=2)
        assert [len(choice.logprobs.content[0].top_logprobs) for choice in several.choices] == [2, 2]
        assert several.choices == chat(n=2, seed=5, temperature=1, max_tokens=4, logprobs=True, top_logprobs=2).choices
        mixed = chat(extra_body={"fedpeft": {"mixture": {"cats": 1.0}}})
        assert (mixed.choices, mixed.fedpeft["mixture"]) == (whole.choices, {"cats@1": 1.0})
        mood = chat(model="task:mood", n=2)
        assert [choice.message.content for choice in mood.choices] == [max(mood.fedpeft["scores"], key=mood.fedpeft["scores"].get)] * 2
        done = client.completions.create(model="base", prompt=["Once", "The"], temperature=0, max_tokens=4, logprobs=1)
        assert [len(choice.logprobs.tokens) for choice in done.choices] == [4, 4]
        vectors = client.embeddings.create(model="base", input=TEXTS["cats"])  # asks for base64 of itself
        assert np.allclose([row.embedding for row in vectors.data], base.embed(TEXTS["cats"]), atol=1e-5)
        for body, fault, param in [
            ({"model": "gpt-4"}, openai.NotFoundError, "model"),
            ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
            ({"messages": [{"role": "user", "content": "a " * 400}]}, openai.BadRequestError, "messages"),
            ({"model": "task:mood", "temperature": 0.7}, openai.BadRequestError, "temperature"),
            ({"model": "task:mood", "logprobs": True}, openai.BadRequestError, "logprobs"),
        ]:
            with pytest.raises(fault) as told:
                chat(**body)
            assert (told.value.param, told.value.type) == (param, "invalid_request_error")
        with pytest.raises(openai.BadRequestError, match="split it"):
            client.embeddings.create(model="base", input="a " * 400)
        with pytest.raises(openai.BadRequestError, match="200 for each of 32 choices; this server generates at most 4096 a request"):
            client.completions.create(model="base", prompt=["Once", "The"], n=16, max_tokens=200)
        cancelled = api.backend.counts.cancelled
        with chat(stream=True, max_tokens=200, logit_bias={"2": -100}) as left:
            next(iter(left))
        wait(lambda: api.backend.counts.cancelled == cancelled + 1)


WRONG = [
    ({"model": "task:none"}, 404, "model_not_found"),
    ({"model": "gpt-4"}, 404, "model_not_found"),
    ({"frobnicate": 1}, 400, "unknown_parameter"),
    ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter"),
    ({"temperature": 3}, 400, "invalid_value"),
    ({"messages": []}, 400, "invalid_value"),
    ({"messages": [{"role": "user", "content": "a " * 400}]}, 400, "context_length_exceeded"),
    ({"max_tokens": 100_000}, 400, "context_length_exceeded"),
    ({"top_logprobs": 2}, 400, "invalid_value"),
    ({"logit_bias": {"999999": 1}}, 400, "invalid_value"),
    ({"fedpeft": {"mixture": {"cats": 0.5, "mood": 0.5}}}, 400, None),
    ({"fedpeft": {"mixture": {"cats": float("1e9")}}}, 400, "invalid_value"),
]


@pytest.mark.parametrize(
    ("change", "status", "code"), WRONG, ids=[next(iter(change)) + str(place) for place, (change, *_) in enumerate(WRONG)]
)
def test_a_wrong_request_is_told_what_is_wrong(api, change, status, code):
    found = api.post("/v1/chat/completions", **{"model": "base", "messages": [PROMPT], **change})
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code
    assert error["message"]


def test_what_is_no_request_is_refused(api):
    assert api.http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert api.http.post("/v1/chat/completions", content=b"[1]", headers={"content-type": "application/json"}).status_code == 400
    assert api.http.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert api.http.get("/v1/chat/completions").status_code == 405
    assert api.http.get("/v1/nothing").json()["error"]["code"] == "unknown_url"
    assert api.http.get("/v1/models", headers={"host": "evil.example"}).status_code == 421
    assert api.post("/v1/embeddings", model="auto", input="x").status_code == 400
    assert api.post("/v1/completions", model="auto", prompt=["x", "y"]).status_code == 400
    large = b'{"model": "base", "messages": [{"role": "user", "content": "' + b"a" * (1 << 20) + b'"}]}'
    assert api.http.post("/v1/chat/completions", content=large, headers={"content-type": "application/json"}).status_code == 413


def test_an_encoder_serves_labels_and_embeddings_and_says_that_it_writes_no_text(serving, tmp_path):
    free, store = load_base(BaseSpec("minilm", max_tokens=64)), Registry(tmp_path / "registry")
    publish(store, free, Classification("mood", ("glad", "sad", "calm")), 7, "enc/mood", TEXTS["cats"])
    publish(store, free, Classification("place", ("here", "there")), 8, "enc/place", TEXTS["ships"])
    api = serving(load_base(BaseSpec("minilm", max_tokens=64)), store.root)
    for name, labels in [("mood", {"glad", "sad", "calm"}), ("place", {"here", "there"})]:
        assert set(api.chat(f"task:{name}")["fedpeft"]["scores"]) == labels
    found = api.post("/v1/chat/completions", model="auto", messages=[{"role": "user", "content": TEXTS["ships"][1]}]).json()
    assert found["fedpeft"]["route"]["task"] == "place"
    vectors = api.post("/v1/embeddings", model="base", input=TEXTS["cats"]).json()["data"]
    assert np.allclose([row["embedding"] for row in vectors], free.embed(TEXTS["cats"]), atol=1e-5)
    refused = api.post("/v1/chat/completions", model="base", messages=[PROMPT])
    assert refused.status_code == 400
    assert "encoder and generates no text" in refused.json()["error"]["message"]


def test_more_open_requests_than_allowed_are_told_when_to_come_back(serving, fresh, registry):
    api = serving(fresh(), registry, connections=1)
    host = api.url.removeprefix("http://")
    with socket.create_connection(tuple(host.split(":"))) as open_one:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        open_one.sendall(head.encode() + b"{")
        wait(lambda: api.http.get("/v1/models").status_code == 503)
        refused = api.http.get("/v1/models")
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "server_error"
    wait(lambda: api.http.get("/v1/models").status_code == 200)


def test_models_health_and_metrics(api):
    api.chat("base", max_tokens=1)
    rows = {row["id"]: row for row in api.http.get("/v1/models").json()["data"]}
    assert set(rows) == {"base", "auto", "task:cats", "task:ships", "task:mood"}
    assert rows["task:cats"]["fedpeft"]["version"] == "cats@1"
    assert api.http.get("/v1/models/task:cats").json() == rows["task:cats"]
    assert api.http.get("/v1/models/task:x").status_code == 404
    assert api.http.get("/healthz").json() == {"status": "ok"}
    text = api.http.get("/metrics").text
    assert 'fedpeft_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "fedpeft_completion_tokens_total" in text


def wait(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def test_a_caller_who_leaves_frees_the_place(api):
    before = api.backend.counts.cancelled
    body = {"model": "base", "messages": [PROMPT], "stream": True, "logit_bias": {"2": -100}, "max_tokens": 200}
    with api.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=api.url, timeout=0.05) as hasty:
        hasty.post("/v1/chat/completions", json={**body, "stream": False})
    wait(lambda: api.backend.counts.cancelled == before + 2)
    wait(lambda: api.backend.engine.load == (0, 0))


def test_a_caller_who_reads_nothing_holds_up_nobody(api, alone):
    body = json.dumps({"model": "base", "messages": [PROMPT], "stream": True, "logit_bias": {"2": -100}, "max_tokens": 200}).encode()
    host = api.url.removeprefix("http://")
    with socket.create_connection(tuple(host.split(":"))) as hung:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        hung.sendall(head.encode() + body)
        assert api.chat("task:cats", temperature=0, max_tokens=12)["choices"][0]["message"]["content"].strip() == alone["cats"]


def test_overload_is_refused_with_when_to_come_back(serving, fresh, registry):
    api = serving(fresh(), registry, rows=1, queue=1)

    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=api.url, timeout=60) as http:
            body = {"model": "base", "messages": [PROMPT], "logit_bias": {"2": -100}, "max_tokens": 60}
            return await asyncio.gather(*(http.post("/v1/chat/completions", json=body) for _ in range(8)))

    found = asyncio.run(crowd())
    refused = [answer for answer in found if answer.status_code == 429]
    assert {answer.status_code for answer in found} == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert all(answer.json()["error"]["type"] == "rate_limit_error" for answer in refused)
    api.backend.close()
    stopped = api.post("/v1/chat/completions", model="base", messages=[PROMPT])
    assert stopped.status_code == 503
    assert stopped.headers["retry-after"]
    assert api.http.get("/healthz").status_code == 503


def test_keys_are_asked_for_where_they_are_set(serving, fresh, registry, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\nsecond-key\n")
    keys.chmod(0o600)
    api = serving(fresh(), registry, keys=keys)
    assert api.http.get("/healthz").status_code == 200
    for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first-key"}, {"authorization": "Bearer first-ke"}):
        found = api.http.get("/v1/models", headers=header)
        assert found.status_code == 401
        assert found.json()["error"]["code"] == "invalid_api_key"
    for key in ("first-key", "second-key"):
        assert api.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


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


def test_an_encoder_decoder_answers_streams_and_labels_beside_others(serving, seq2seq_folder, tmp_path):
    spec = BaseSpec(str(seq2seq_folder("bart")), max_tokens=32)
    free, store, text = load_base(spec, "cpu"), Registry(tmp_path / "registry"), "w1 w2 w3"
    tasks = [Generation("say", max_new_tokens=8), Generation("tell", max_new_tokens=8), Classification("mood", ("glad", "sad", "calm"))]
    alone = {}
    for seed, task in enumerate(tasks):
        publish(store, free, task, seed, task.name, scale=1.6)
        with attach(free, (adapter := store.load(task.name)).spec) as live:
            live.load(adapter.tensors)
            alone[task.name] = task.answer(live.model.eval(), free, text)
    assert len(set(alone.values())) == 3
    api, message = serving(load_base(spec, "cpu"), store.root), [{"role": "user", "content": text}]
    with ThreadPoolExecutor(4) as pool:
        body = {"temperature": 0, "max_tokens": 8}
        pieces = {name: pool.submit(streamed, api, model=f"task:{name}", messages=message, **body) for name in alone}
        whole = {name: pool.submit(api.post, "/v1/completions", model=f"task:{name}", prompt=text, **body) for name in alone}
    for name, want in alone.items():
        told = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in pieces[name].result())
        assert whole[name].result().json()["choices"][0]["text"].strip() == told.strip() == want.partition(" (")[0]
    found = api.post("/v1/chat/completions", model="base", messages=message, max_tokens=33).json()["error"]
    assert (found["code"], found["param"]) == ("context_length_exceeded", "messages")
    assert "32 tokens on each side" in found["message"]


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
