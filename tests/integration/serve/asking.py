"""A server's clients, and the adapters that it serves."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import httpx
import numpy as np

from fedpeft.adapters import Adapter, make_spec
from fedpeft.config import describe
from fedpeft.methods import Lora
from fedpeft.registry import Manifest, Registry
from fedpeft.routing import make_card
from fedpeft.routing.cards import centroid, histogram
from fedpeft.tensors import Tensors

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


def streamed(api: Api, path: str = "/v1/chat/completions", **body: object) -> list[dict]:
    asked = {"stream": True, **body} if "prompt" in body else {"messages": [PROMPT], "stream": True, **body}
    with api.http.stream("POST", path, json=asked) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def wait(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
