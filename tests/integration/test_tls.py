"""The README's two-machine tour on loopback: TLS and registered site keys, made by `fedpeft certificates`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
FEDERATION = """
name = "tls"
rounds = 1
state = "coordinator"
[base]
model = "minilm"
max_tokens = 16
[training]
steps = 2
batch_size = 8
[cohort]
deadline = 120.0
[link]
port = {port}
node_auth = true
node_keys = "certs"
tls = {{ ca = "certs/ca.crt", cert = "certs/server.pem", key = "certs/server.key" }}
[tasks.colour]
kind = "classification"
labels = ["blue", "red"]
"""
SITE = """
name = "{name}"
coordinator = "localhost:{port}"
state = "{name}-state"
threads = 1
[base]
model = "minilm"
[data.colour]
path = "rows.jsonl"
[tls]
root_certificates = "certs/ca.crt"
[auth]
key = "{key}"
"""


@pytest.fixture
def start(tmp_path):
    running: list[subprocess.Popen[bytes]] = []

    def go(*verb: str) -> subprocess.Popen[bytes]:
        log = (tmp_path / f"{verb[-1]}.log").open("ab")
        command = [sys.executable, "-m", "fedpeft", *verb]
        running.append(subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        log.close()
        return running[-1]

    yield go
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.timeout(240)
def test_a_registered_site_trains_over_tls_and_a_stranger_does_not_get_in(tmp_path, start, free_port):
    tool = [sys.executable, "-m", "fedpeft", "certificates"]
    subprocess.run([*tool, str(tmp_path / "certs"), "--host", "localhost", "--site", "hospital-a"], check=True, capture_output=True)
    subprocess.run([*tool, str(tmp_path / "elsewhere"), "--host", "localhost", "--site", "stranger"], check=True, capture_output=True)
    rows = [{"text": f"{'sea' if i % 2 else 'fire'} number {i}", "label": "blue" if i % 2 else "red"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "federation.toml").write_text(FEDERATION.format(port=free_port))
    (tmp_path / "hospital-a.toml").write_text(SITE.format(name="hospital-a", port=free_port, key="certs/hospital-a.key"))
    (tmp_path / "stranger.toml").write_text(SITE.format(name="stranger", port=free_port, key="elsewhere/stranger.key"))

    coordinator = start("coordinator", "up", "federation.toml")
    start("client", "join", "stranger.toml")
    events = tmp_path / "coordinator" / "events.jsonl"
    deadline = time.monotonic() + 60
    while not events.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    start("client", "join", "hospital-a.toml")
    assert coordinator.wait(200) == 0, (tmp_path / "federation.toml.log").read_text(errors="replace")[-1500:]
    answered = {event["site"] for event in map(json.loads, events.read_text().splitlines()) if event["event"] in ("site", "answer")}
    assert answered == {"hospital-a"}
