"""The site's API on a vision base: an image is answered by its task's label, routed like a text, and nothing else is read or fetched."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from fedpeft.adapters import Adapter, attach, initial, make_spec
from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft.cli.main import run
from fedpeft.config import describe
from fedpeft.methods import Lora
from fedpeft.registry import Manifest, Registry
from fedpeft.routing import make_card
from fedpeft.routing.cards import centroid, histogram
from fedpeft.tasks import Classification, Source, read_rows
from fedpeft.tensors import Tensors
from fedpeft_client.serve.run import opened, server
from fedpeft_client.serve.settings import Serve

pytestmark = pytest.mark.integration

TASKS = {"low": Classification("low", ("0", "1")), "high": Classification("high", ("8", "9", "7"))}


@dataclass
class Site:
    """A running server, and what it serves."""

    http: httpx.Client
    base: Base
    adapters: dict[str, Adapter]
    rows: dict[str, list[dict[str, str]]]
    registry: Path

    def chat(self, model: str, *parts: dict[str, object], **body: object) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": list(parts)}], **body})


def url(path: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def image(path: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url(path), "detail": "auto"}}


@pytest.fixture(scope="module")
def site(vision_folder: Callable[[str], Path], digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("registry")
    spec = BaseSpec(str(vision_folder("ViT")))
    base, registry, adapters, rows = load_base(spec), Registry(folder), {}, {}
    for seed, (name, task) in enumerate(TASKS.items()):
        rows[name] = read_rows(Source(path=str(digits), where={"label": list(task.labels)}, limit=20))
        made = make_spec(name, base, Lora(r=4, targets=("all",)), task.head)
        noise = np.random.default_rng(seed).normal(0, 0.3, made.layout.size).astype(np.float32)
        adapters[name] = Adapter(made, Tensors(made.layout, initial(base, made, 0).tensors.flat + noise))
        vectors = base.embed([task.text_of(row) for row in rows[name]])
        card = make_card(vectors.sum(0), 20, histogram(vectors, centroid(vectors.sum(0), 20)), encoder=base.encoder).to_json()
        registry.publish(adapters[name], Manifest(task_settings=describe(task), card=card), origin="test")
    chosen = Serve(registry=str(folder))
    listener, backend = socket.create_server((chosen.host, 0)), opened(chosen, load_base(spec))
    web = server(chosen, backend)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
    thread.start()
    with httpx.Client(base_url=f"http://{chosen.host}:{listener.getsockname()[1]}", timeout=60) as http:
        yield Site(http, base, adapters, rows, folder)
    web.should_exit = True
    thread.join()
    backend.close()
    listener.close()


def test_an_image_is_answered_by_its_tasks_label(site: Site) -> None:
    for name, task in TASKS.items():
        path = site.rows[name][0]["image"]
        with attach(site.base, site.adapters[name].spec) as live:
            live.load(site.adapters[name].tensors)
            wanted = task.answer(live.model.eval(), site.base, path)
        for model in (f"task:{name}", "auto"):
            found = site.chat(model, {"type": "text", "text": "what is this?"}, image(path))
            assert found.status_code == 200, found.text
            table = found.json()
            scores = table["fedpeft"]["scores"]
            label = table["choices"][0]["message"]["content"]
            assert f"{label} ({scores[label]:.0%})" == wanted or model == "auto"
            assert table["usage"]["prompt_tokens"] == 17
        assert table["fedpeft"]["route"]["task"] in TASKS  # untrained trunk: any
    found = site.http.post("/v1/embeddings", json={"model": "base", "input": url(path)}).json()
    np.testing.assert_allclose(found["data"][0]["embedding"], site.base.embed([path])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (({"type": "text", "text": "what is this?"},), "holds no image, and this base reads images"),
        (({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},), "no link is followed"),
        (({"type": "image_url", "image_url": {"url": "/etc/passwd"}},), "holds no image"),
        (({"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}},), "not base64"),
        (({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}},), "it is no PNG or JPEG"),
        (({"type": "image_url", "image_url": {"url": "a"}},) * 2, "there are several images, and one a request is answered"),
    ],
)
def test_what_is_no_image_is_one_fault_of_the_caller(site: Site, parts: tuple[dict[str, object], ...], says: str) -> None:
    for model in ("task:low", "auto"):
        found = site.chat(model, *parts)
        assert (found.status_code, says in found.json()["error"]["message"]) == (400, True), found.text
    assert site.http.get("/healthz").json() == {"status": "ok"}


def test_text_is_neither_completed_nor_generated(site: Site) -> None:
    found = site.http.post("/v1/completions", json={"model": "task:low", "prompt": "0"})
    assert (found.status_code, "send one to /v1/chat/completions as image_url" in found.text) == (400, True)
    found = site.chat("base", image(site.rows["low"][0]["image"]))
    assert (found.status_code, "is an encoder and generates no text" in found.text) == (400, True)


def test_commands_take_the_path_of_an_image_and_rows_of_them(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, place = site.rows["low"][0]["image"], ["--registry", str(site.registry), "--json"]
    assert run(["route", str(path), "--task", "low", *place]) == 0
    with attach(site.base, site.adapters["low"].spec) as live:
        live.load(site.adapters["low"].tensors)
        wanted = TASKS["low"].answer(live.model.eval(), site.base, path)
    assert json.loads(capsys.readouterr().out)["answer"] == wanted
    rows = [{"image": row["image"], "label": row["label"], "task": name} for name in TASKS for row in site.rows[name]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(["evaluate", str(tmp_path / "rows.jsonl"), "--router", "centroid", *place]) == 0
    assert {name: line["rows"] for name, line in json.loads(capsys.readouterr().out).items()} == {"low": 20, "high": 20}
    assert run(["route", "no-such.png", *place]) == 4
    assert "the path of a file that is there" in capsys.readouterr().err
    assert run(["methods", "--family", "prompt", "--base", site.base.spec.model, "--json"]) == 0
    found = {row["method"]: row["refused"] for row in json.loads(capsys.readouterr().out)}
    assert not found["vpt"]
    assert "reads images" in found["prompt"]
