"""The site's API over HTTP on loopback: stories260k, several adapters at once, each answering as it does alone."""

from __future__ import annotations

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from tests.integration.serve.asking import PROMPT, TEXTS, publish, streamed

from fedpeft.adapters import attach
from fedpeft.bases import BaseSpec, load_base
from fedpeft.registry import Registry
from fedpeft.tasks import Classification, Generation

pytestmark = pytest.mark.integration


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
