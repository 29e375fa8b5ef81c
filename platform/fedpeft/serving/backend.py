"""What a server stands on: one warm base, a bank of adapters, the engine's thread, and the catalog that swaps versions.

Prompts are read with a tokenizer of their own on a thread of their own, because a tokenizer serves one thread at a time.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from fedpeft.adapters import Adapter
from fedpeft.bases.spec import CLASSIFIERS
from fedpeft.errors import AdapterError
from fedpeft.routing import Route, XLoraRouter
from fedpeft.routing.policies import token_router
from fedpeft.serving.beside import OWN, Beside
from fedpeft.serving.catalog import Catalog, Served, Source
from fedpeft.serving.decoder import Decoder
from fedpeft.serving.engine import Engine
from fedpeft.serving.heads import Heads, bare
from fedpeft.serving.oneshot import Oneshots, Question, Routing, Seen, Text
from fedpeft.serving.requests import ClosedError, Mixture, Request, TokenMixture
from fedpeft.serving.scheduler import Limits, Scheduler

if TYPE_CHECKING:
    from fedpeft.bases import Base, HeadSpec
    from fedpeft.mixtures import Gates
    from fedpeft.serving.bank import Bank

T = TypeVar("T")
VIRTUAL = ("prompt", "prefix")


class Backend:
    """Generation, embeddings and labels over a base and the versions of a registry; leave the ``with`` block to take it all down."""

    def __init__(self, base: Base, source: Source, limits: Limits, router: str = "chain", beside: Beside | None = None) -> None:
        from fedpeft.mixtures import Bank as Mixtures

        self.base, self._router, self._beside = base, router, beside
        self._own: frozenset[str] = frozenset()
        self._routed: tuple[int, Routing] | None = None
        self._weighing: tuple[tuple[str, tuple[str, ...]], Gates] | None = None
        self._lock = threading.Lock()
        self._front = dataclasses.replace(base, tokenizer=copy.deepcopy(base.tokenizer))
        self._open = ExitStack()
        self._head = _head(base)
        self._bank: Bank = self._open.enter_context(Mixtures.attach(base, self._head, {}))
        self._heads = Heads(base)
        self._oneshots = Oneshots(base, self._bank, self._heads)
        try:
            decoder = Decoder(base, self._bank)
            if base.family not in CLASSIFIERS:
                decoder.probe()
        except BaseException:
            self._open.close()
            raise
        self._scheduler = Scheduler(decoder, base.tokenizer, _ends(base), limits, self._ended)
        self.engine = Engine(self._scheduler).start()
        self.catalog = Catalog(source, base.fingerprint.identity, self)
        self._reader = ThreadPoolExecutor(1, "fedpeft-reader")

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End what runs, and every thread; again changes nothing."""
        self.engine.close()
        self._reader.shutdown(cancel_futures=True)
        self._open.close()

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together, or of each where they are `apart`."""
        from fedpeft.tasks.encoding import token_limit

        window = getattr(self.base.config.get_text_config(), "sliding_window", None)
        return min(token_limit(self.base), window) if isinstance(window, int) and window > 0 else token_limit(self.base)

    @property
    def apart(self) -> bool:
        """Whether prompt and answer have the context each to itself: an encoder-decoder's halves."""
        return self.base.family == "seq2seq"

    def room(self, read: int) -> int:
        """How many tokens an answer to a prompt of ``read`` may have; less than 1 where the prompt is too long."""
        return self.context if self.apart and read <= self.context else self.context - read

    @property
    def sees(self) -> bool:
        """Whether requests are images: the base reads nothing else."""
        return self.base.processor is not None

    @property
    def vocabulary(self) -> int:
        """How many tokens the base knows."""
        return 0 if self.sees else int(self.base.config.get_text_config().vocab_size)

    @property
    def counts(self) -> Any:
        """What the scheduler counted."""
        return self._scheduler.counts

    def put(self, name: str, adapter: Adapter) -> None:
        """Put an adapter to work beside the others. Raises `AdapterError` naming the method when it cannot be."""
        if adapter.spec.method.kind in VIRTUAL:
            raise AdapterError(
                f"{adapter.spec.method.kind} adds virtual tokens, which the cache of mixed rows has no place for; train another method"
            )
        self.engine.call(lambda: self._put(name, adapter))

    def remove(self, name: str) -> None:
        """Take it away."""
        self.engine.call(lambda: self._remove(name))

    def submit(self, request: Request) -> None:
        """Queue a generation whose mixture came from `Catalog.take`; it is released when the request ends, here too when refused."""
        try:
            self.engine.submit(request)
        except BaseException:
            self.catalog.release(request.mixture)
            raise

    def embed(self, ids: Sequence[int] | Seen, mixture: Mixture) -> Future[Any]:
        """A text's embedding (D,) under a mixture from `Catalog.take`, which is released when it is there."""
        return self._asked(self._oneshots.embed, Text(_held(ids), mixture), mixture)

    def classify(self, ids: Sequence[int] | Seen, mixture: Mixture, labels: tuple[str, ...]) -> Future[dict[str, float]]:
        """Label -> probability by the only adapter of ``mixture``; released as by `embed`."""
        from fedpeft.tasks.encoding import ended

        if self.apart and not isinstance(ids, Seen):
            ids = ended(self.base, list(ids))
        return self._asked(self._oneshots.classify, Text(_held(ids), mixture, labels), mixture)

    def answer(self, text: str, mixture: Mixture, task: Any) -> Future[Any]:
        """What ``task`` itself says to ``text``; released as by `embed`."""
        return self._asked(self._oneshots.answer, Question(text, mixture, task), mixture)

    async def own(self, served: Served, text: str) -> float:
        """What the server's own adapter beside a version counts for ``text``; 0 where it has none."""
        if self._beside is None or served.name not in self._own:
            return 0.0
        return await self._beside.weight(served, text, self._embedded)

    async def _embedded(self, text: str) -> Any:
        ids = await asyncio.wrap_future(self.read(self.read_in, text))
        return await asyncio.wrap_future(self.embed(ids, {}))

    def with_own(self, mixture: Mixture, weight: float) -> Mixture:
        """``mixture``, held, of one version, with the server's own adapter beside it, held as well; the version stays the first."""
        name = next(iter(mixture))
        if weight == 0.0 or name not in self._own:
            return mixture
        return {**mixture, **self.catalog.share({name + OWN: weight})}

    def route(self, text: str) -> Future[Route]:
        """Where a text goes by the router that was named, over the cards of what is served now."""
        return self.engine.ask(self._oneshots.route, (text, self._routing()))

    def shares(self, route: Route) -> Mapping[str, float]:
        """A route as weights of tasks: texts are mixed with texts; labels have no mixture, so the first's."""
        served = self.catalog.served()
        if route.task is None or route.task not in served:
            return {}
        if served[route.task].task.kind != "generation":
            return {route.task: 1.0}
        every = route.scores if route.level == "token" else route.weights
        return {name: route.weights.get(name, 0.0) for name in every if name in served and served[name].task.kind == "generation"}

    def weighed(self, mixture: Mixture, kind: str) -> Mixture:
        """``mixture``, held, as the router ``kind`` over its versions weighs it, token by token."""
        from fedpeft.mixtures.routers import routed

        key = kind, tuple(sorted(mixture))
        with self._lock:
            if self._weighing is None or self._weighing[0] != key:
                router = token_router(kind, {name: self.catalog.card(name) for name in mixture})
                self._weighing = key, routed(router, self.base.device)
            return TokenMixture(mixture, self._weighing[1])

    def _routing(self) -> Routing:
        """The router over what is served now; made again when that changes."""
        with self._lock:
            if self._routed is None or self._routed[0] != self.catalog.generation:
                generation = self.catalog.generation
                others = self.catalog.routers() if self._router == XLoraRouter.kind else {}
                cards = {**others, **self.catalog.cards()}
                self._routed = (generation, Routing.over(self._router, cards, self.base))
            return self._routed[1]

    def read(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Do what tokenizes on the one thread that may. Raises `ClosedError` when the backend is closed."""
        try:
            return self._reader.submit(work, *arguments)
        except RuntimeError:
            raise ClosedError("the server is stopping; ask another one") from None

    def read_in(self, text: str, cut: bool = True) -> list[int] | Seen:
        """What is embedded or classified: a text's tokens, as `ids`, or the image that it holds. Inside `read`.

        Raises:
            DataError: the base reads images, and this is none.
        """
        if self.base.processor is None:
            return self.ids(text, cut)
        return Seen(self.base.processor.pixels(text), self.base.processor.tokens)

    def ids(self, text: str, cut: bool = True) -> list[int]:
        """Token ids of a text that is embedded or classified, by default cut to the base's limit. Inside `read`."""
        from fedpeft.tasks.encoding import pad_id, token_limit

        limit = token_limit(self.base) if cut else None
        found = self._front.tokenizer(text, truncation=cut, max_length=limit, verbose=False)["input_ids"]
        return list(found) or [pad_id(self.base)]

    def begun(self, text: str) -> list[int]:
        """Token ids of a text that is continued as it stands: it has not ended, unless it is an encoder that reads it. Inside `read`."""
        ids = self.ids(text, cut=False)
        return ids[:-1] if not self.apart and len(ids) > 1 and ids[-1] == self._front.tokenizer.eos_token_id else ids

    def prompt(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a prompt or a chat as tasks are trained on. Inside `read`."""
        from fedpeft.tasks.encoding import prompt_ids

        return prompt_ids(self._front, prompt)

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text. Inside `read`."""
        return str(self._front.tokenizer.decode(list(ids)))

    def _asked(self, work: Any, item: Any, mixture: Mixture) -> Future[Any]:
        try:
            answer = self.engine.ask(work, item)
        except BaseException:
            self.catalog.release(mixture)
            raise
        answer.add_done_callback(lambda _done: self.catalog.release(mixture))
        return answer

    def _ended(self, request: Request) -> None:
        self.catalog.release(request.mixture)

    def _put(self, name: str, adapter: Adapter) -> None:
        self._put_version(name, adapter)
        own = None if self._beside is None else self._beside.adapter(adapter)
        if own is not None:
            self._bank.put(name + OWN, bare(own, self.base, self._head))
            self._own |= {name}

    def _put_version(self, name: str, adapter: Adapter) -> None:
        if adapter.spec.head.kind != "classification":
            return self._bank.put(name, adapter)
        self._bank.put(name, bare(adapter, self.base, self._head))
        try:
            self._heads.put(name, adapter)
        except BaseException:
            self._bank.remove(name)
            raise
        return None

    def _remove(self, name: str) -> None:
        self._heads.remove(name)
        self._bank.remove(name)
        if name in self._own:
            self._own -= {name}
            self._bank.remove(name + OWN)


def _head(base: Base) -> HeadSpec:
    """The head that the bank's model has: an encoder's is never used, each task brings its own."""
    from fedpeft.bases import HeadSpec

    return HeadSpec("classification", ("no", "yes")) if base.family in CLASSIFIERS else HeadSpec("lm")


def _held(ids: Sequence[int] | Seen) -> tuple[int, ...] | Seen:
    return ids if isinstance(ids, Seen) else tuple(ids)


def _ends(base: Base) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those that the model was tuned to end a turn with."""
    if base.processor is not None:
        return frozenset()
    settings = getattr(base.model, "generation_config", None)
    tuned = getattr(settings, "eos_token_id", None)
    found = [base.tokenizer.eos_token_id, *(tuned if isinstance(tuned, list) else [tuned])]
    return frozenset(int(token) for token in found if token is not None)
