"""The API's endpoints: read, choose who answers, generate or ask, answer in OpenAI's form."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from fedpeft.bases.spec import CLASSIFIERS
from fedpeft.errors import DataError
from fedpeft.serving.backend import Backend
from fedpeft.serving.oneshot import Seen
from fedpeft_client.serve.bodies import read, until_gone
from fedpeft_client.serve.errors import ApiError, invalid
from fedpeft_client.serve.flow import Flow
from fedpeft_client.serve.generating import Job, gathered, streamed
from fedpeft_client.serve.labels import check_label, labelled, scores_of
from fedpeft_client.serve.metrics import Metrics
from fedpeft_client.serve.prompts import chat_prompt, fitted, of_input, of_prompt
from fedpeft_client.serve.render import Renderer, replayed, usage_of
from fedpeft_client.serve.schema import Chat, Completion, Embeddings, parse
from fedpeft_client.serve.settings import Serve
from fedpeft_client.serve.streams import EventStream
from fedpeft_client.serve.targets import AUTO, BASE, TASK, Held, Target, choose, hold

T = TypeVar("T")


@dataclass(frozen=True)
class Endpoints:
    """The handlers, over one backend."""

    backend: Backend
    settings: Serve
    metrics: Metrics

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        began, body = time.monotonic(), parse(await read(http, self.settings), Chat)
        await self._fits(body)
        target = await choose(self.backend, body.model, body.fedpeft, body.asked)
        if target.kind != "generation":
            return await self._label(http, body, target, [body.asked])
        self._writes(body, target)
        ids = await self._reading(chat_prompt, self.backend, target, body)
        return await self._generate(http, Job(body, target, [ids], body.budget, body.tops, True, began))

    async def completions(self, http: HttpRequest) -> Response:
        """POST /v1/completions: the prompt as it stands, no template, no line end."""
        began, body = time.monotonic(), parse(await read(http, self.settings), Completion)
        if self.backend.sees:
            raise invalid(f"the base {self.backend.base.spec.model} reads images; send one to /v1/chat/completions as image_url", "prompt")
        self._few(len(body.prompts) * body.copies, "prompt")
        if body.model == AUTO and body.fedpeft is None and len(body.prompts) > 1:
            raise invalid("auto routes one prompt a request; send several requests, or name a task", "prompt", "invalid_value")
        first = await self._reading(of_prompt, self.backend, body.prompts[0])
        target = await choose(self.backend, body.model, body.fedpeft, first.text)
        prompts = [await self._reading(of_prompt, self.backend, prompt) for prompt in body.prompts]
        if target.kind != "generation":
            return await self._label(http, body, target, [prompt.text for prompt in prompts])
        self._writes(body, target)
        return await self._generate(
            http, Job(body, target, [prompt.ids for prompt in prompts], body.max_tokens, body.logprobs, False, began)
        )

    async def embeddings(self, http: HttpRequest) -> Response:
        """POST /v1/embeddings: the base's own, or a task's, whose adapter then acts on the trunk."""
        body = parse(await read(http, self.settings), Embeddings)
        if body.model == AUTO:
            raise invalid("embeddings of different adapters cannot be compared; name base or one task", "model", "invalid_value")
        self._few(len(body.inputs), "input")
        target = await choose(self.backend, body.model, body.fedpeft, "")
        texts = [await self._reading(of_input, self.backend, one) for one in body.inputs]
        with hold(self.backend, target) as held:
            asks = [self.backend.embed(ids, self.backend.catalog.share(held.mixture)) for ids in texts]
        vectors = await self._all(http, asks)
        rows = [{"object": "embedding", "index": n, "embedding": _coded(vector, body.encoding_format)} for n, vector in enumerate(vectors)]
        used = sum(map(len, texts))
        table = {"object": "list", "model": body.model, "data": rows, "usage": {"prompt_tokens": used, "total_tokens": used}}
        return JSONResponse(table | {"fedpeft": held.said()}, headers=held.header)

    async def models(self, _http: HttpRequest) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": list(self._models().values())})

    async def model(self, http: HttpRequest) -> Response:
        """GET /v1/models/NAME."""
        name, known = http.path_params["name"], self._models()
        if name not in known:
            raise ApiError(404, f"the model {name!r} does not exist; models are {list(known)}", "model_not_found", "model")
        return JSONResponse(known[name])

    async def health(self, _http: HttpRequest) -> Response:
        """GET /healthz."""
        fine = self.backend.engine.healthy
        return JSONResponse({"status": "ok" if fine else "unavailable"}, 200 if fine else 503)

    async def prometheus(self, _http: HttpRequest) -> Response:
        """GET /metrics."""
        return PlainTextResponse(self.metrics.text(self.backend), media_type="text/plain; version=0.0.4")

    def _models(self) -> dict[str, dict[str, Any]]:
        base = {"base_model": self.backend.base.spec.model, "context": self.backend.context}
        found = {name: {"id": name, "object": "model", "created": 0, "owned_by": "fedpeft", "fedpeft": base} for name in (BASE, AUTO)}
        for task, served in sorted(self.backend.catalog.served().items()):
            about = {"version": served.name, "digest": served.version.digest, "kind": served.task.kind}
            found[TASK + task] = {"id": TASK + task, "object": "model", "created": 0, "owned_by": "fedpeft", "fedpeft": base | about}
        return found

    async def _fits(self, body: Chat) -> None:
        """Raise `ApiError` when an image comes to a base that reads text, or what comes to one that reads images is none."""
        if self.backend.sees:
            await self._reading(self.backend.read_in, body.asked)
        elif body.image is not None:
            raise invalid(f"the base {self.backend.base.spec.model} reads text and no image_url; ask it in words", "messages")

    def _writes(self, body: Chat | Completion, target: Target) -> None:
        """Raise `ApiError` when the base generates no text."""
        if self.backend.base.family in CLASSIFIERS:
            why = f"'auto' found no task near this request ({target.route.get('why', '')}), and " if body.model == AUTO else ""
            tasks = [TASK + task for task in sorted(self.backend.catalog.served())]
            base = f"the base {self.backend.base.spec.model} is an encoder and generates no text"
            raise invalid(f"{why}{base}; name a classification task of {tasks}", "model")

    async def _generate(self, http: HttpRequest, job: Job) -> Response:
        wanted = fitted(job, self.backend, self.settings.max_tokens)
        with hold(self.backend, job.target) as held:
            flow = Flow(self.backend, wanted, held.mixture)
        render = Renderer(job.chat, job.body.model, held.said(), self.backend.text, job.tops is not None, job.body.wants_usage)
        if job.body.stream:
            return EventStream(streamed(flow, render, job, self.metrics), flow.close, held.header)
        try:
            choices = await until_gone(http, gathered(flow, job, self.metrics))
        finally:
            flow.close()
        return JSONResponse(render.whole(choices, usage_of(choices, job.read)), headers=held.header)

    async def _label(self, http: HttpRequest, body: Chat | Completion, target: Target, texts: Sequence[str]) -> Response:
        """Tasks that answer by a label or a choice: it is the completion, and the scores are beside it."""
        check_label(body, target)
        rows = [await self._reading(self.backend.read_in, text) for text in texts]
        with hold(self.backend, target) as held:
            asks = [self._asked(held, text, ids) for text, ids in zip(texts, rows, strict=True)]
        found = await self._all(http, asks)
        said, choices = held.said(**scores_of(found)), labelled(body, found)
        render = Renderer(isinstance(body, Chat), body.model, said, self.backend.text, counted=body.wants_usage)
        usage = usage_of(choices, sum(map(len, rows)))
        if not body.stream:
            return JSONResponse(render.whole(choices, usage), headers=held.header)
        return EventStream(replayed(render, choices, usage, body.wants_usage), lambda: None, held.header)

    def _asked(self, held: Held, text: str, ids: Sequence[int] | Seen) -> Future[Any]:
        served, mixture = held.target.served, self.backend.catalog.share(held.mixture)
        assert served is not None
        if held.target.kind == "classification":
            return self.backend.classify(ids, mixture, served.task.head.labels)
        return self.backend.answer(text, mixture, served.task)

    async def _all(self, http: HttpRequest, asks: Sequence[Future[Any]]) -> list[Any]:
        return await until_gone(http, asyncio.gather(*map(asyncio.wrap_future, asks)))

    async def _reading(self, work: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.wrap_future(self.backend.read(work, *arguments))
        except DataError as fault:  # an image that is none
            raise invalid(str(fault)) from None

    def _few(self, count: int, name: str) -> None:
        if count > self.settings.max_inputs:
            raise invalid(f"{name}: {count} in one request; at most {self.settings.max_inputs} are answered, send several requests", name)


def _coded(vector: Any, form: str) -> Any:
    values = np.asarray(vector, "<f4")
    return values.tolist() if form == "float" else base64.b64encode(values.tobytes()).decode()
