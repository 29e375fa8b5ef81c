"""Every way a caller can be right or wrong, leave, come in a crowd or without a key."""

from __future__ import annotations

import asyncio
import json
import socket

import httpx
import numpy as np
import pytest
from tests.integration.serve.asking import PROMPT, TEXTS, wait

pytestmark = pytest.mark.integration


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


def test_an_image_for_a_base_of_text_is_refused(api):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    found = api.post("/v1/chat/completions", model="base", messages=[{"role": "user", "content": [part]}])
    assert (found.status_code, "reads text and no image_url" in found.text) == (400, True)
