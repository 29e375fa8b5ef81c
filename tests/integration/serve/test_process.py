"""`fedpeft client serve` as a process: TLS, keys, a control plane, an end while it answers; and settings that cannot hold."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from fedpeft.adapters import Adapter, make_spec
from fedpeft.cli.main import run
from fedpeft.config import describe
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.issuing import issue
from fedpeft.methods import Lora
from fedpeft.registry import Manifest, Registry
from fedpeft.tasks import Generation
from fedpeft.tensors import Tensors

pytestmark = pytest.mark.integration

PROMPT = [{"role": "user", "content": "Once upon a time"}]
SERVE = """
import sys, threading
from fedpeft.cli.main import run
code = run(["client", "serve", sys.argv[1]])
print("left:", sorted(one.name for one in threading.enumerate()))
sys.exit(code)
"""


def publish(store: Registry, base, seed: int) -> None:
    task = Generation("say")
    spec = make_spec("say", base, Lora(r=4), task.head)
    values = np.random.default_rng(seed).normal(scale=0.1, size=spec.layout.size).astype(np.float32)
    store.publish(Adapter(spec, Tensors(spec.layout, values)), Manifest(task_settings=describe(task)), origin=f"say/{seed}")


@pytest.fixture
def far(tmp_path, base) -> Iterator[tuple[Registry, str]]:
    """A control plane on loopback over a registry with one version, and its address."""
    from fedpeft_coordinator.control.config import Control
    from fedpeft_coordinator.control.serve import Server

    store = Registry(tmp_path / "far")
    publish(store, base, 1)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = Server(store, Control(port=0, poll=0.05, embed=False), tmp_path / "state")
    port = asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
    yield store, f"grpc://127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_a_served_site_with_tls_keys_and_a_control_plane_ends_what_it_began_when_terminated(tmp_path, base, far, shared_models):
    store, address = far
    issue(tmp_path / "certs", ["localhost", "127.0.0.1"], [])
    (tmp_path / "keys").write_text("a-key\n")
    (tmp_path / "keys").chmod(0o600)
    (tmp_path / "site.toml").write_text(f"""
name = "s"
[base]
model = "{shared_models / "stories260k"}"
max_tokens = 256
[serve]
registry = "{address}"
port = 0
keys = "keys"
certificate = "certs/server.pem"
key = "certs/server.key"
watch_seconds = 0.1
[data.say]
package = "stdlib"
""")
    command = [sys.executable, "-c", SERVE, str(tmp_path / "site.toml")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        url = said.rsplit(" ", 1)[1].strip().replace("127.0.0.1", "localhost")
        assert url.startswith("https://"), said
        context = ssl.create_default_context(cafile=str(tmp_path / "certs/ca.crt"))
        with httpx.Client(base_url=url, verify=context, timeout=60, headers={"authorization": "Bearer a-key"}) as http:
            assert http.get("/models", headers={"authorization": "Bearer b-key"}).status_code == 401
            assert http.get("/models/task:say").json()["fedpeft"]["version"] == "say@1"
            publish(store, base, 2)
            while http.get("/models/task:say").json()["fedpeft"]["version"] != "say@2":
                pass
            body = {"model": "task:say", "messages": PROMPT, "stream": True, "max_tokens": 220, "logit_bias": {"2": -100}, "n": 4}
            with http.stream("POST", "/chat/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                refused = http.get("/models")
                rest = [line for line in lines if line]
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 0
        assert process.stdout.read() == "left: ['MainThread']\n"
        err = process.stderr.read() if process.stderr else ""
        assert "Traceback" not in err
        assert "a-key" not in err
        assert "say@2" in err
    finally:
        process.kill()
        process.communicate()


WRONG = [
    (["serve.host=0.0.0.0"], "needs serve.keys"),
    (["serve.host=0.0.0.0", "serve.keys=keys"], "needs serve.certificate"),
    (["serve.certificate=x"], "belong together"),
    (["serve.prot=1"], "unknown key"),
    (["serve.keys=absent"], "cannot be read"),
    (["serve.keys=open"], "chmod 600"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG, ids=[words for _, words in WRONG])
def test_settings_that_cannot_hold_are_refused_before_anything_is_loaded(tmp_path, base, capsys, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "open").write_text("key\n")
    (tmp_path / "open").chmod(0o644)
    publish(Registry(tmp_path / "registry"), base, 1)
    flags = [word for setting in settings for word in ("--set", setting)]
    assert run(["client", "serve", "--registry", str(tmp_path / "registry"), *flags]) == ConfigError.exit_code
    assert words in capsys.readouterr().err


def test_nothing_to_serve_is_said(tmp_path, capsys):
    assert run(["client", "serve", "--registry", str(tmp_path / "none")]) == AdapterError.exit_code
    assert "holds no version yet" in capsys.readouterr().err
