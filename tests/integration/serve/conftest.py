"""A server of stories260k with several adapters, one for all tests of a file."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.integration.serve.asking import PROMPT, TEXTS, Api, publish

from fedpeft.adapters import attach
from fedpeft.bases import BaseSpec, HeadSpec, load_base
from fedpeft.registry import Registry
from fedpeft.tasks import Classification, Generation
from fedpeft_client.serve.run import opened, server
from fedpeft_client.serve.settings import Serve


@pytest.fixture(scope="session")
def fresh(shared_models):
    """Loads the base anew: a served one carries its mixture."""
    return lambda: load_base(BaseSpec(str(shared_models / "stories260k"), max_tokens=256))


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def registry(tmp_path_factory, base):
    store = Registry(tmp_path_factory.mktemp("serve") / "registry")
    for seed, (name, texts) in enumerate(TEXTS.items()):
        publish(store, base, Generation(name), seed, f"test/{name}", texts)
    publish(store, base, Classification("mood", ("glad", "sad", "calm")), 7, "test/mood")
    return store.root


@pytest.fixture(scope="session")
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
