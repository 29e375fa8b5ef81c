"""kill -9 at any moment, and a disk without room: a version is listed and whole, or it is not there."""

import itertools
import random
import resource
import time

import numpy as np
import pytest

from fedpeft.adapters import Adapter, AdapterSpec
from fedpeft.bases.spec import HeadSpec
from fedpeft.errors import FedpeftError, StorageError
from fedpeft.methods import METHODS
from fedpeft.registry import Manifest, Registry
from fedpeft.tensors import Entry, Layout, Tensors


def publish(root, first, say, size=4000):
    """Publish for ever, and roll back now and then."""
    layout = Layout.of([Entry("A", "base_model.model.q.lora_A.weight", (2, size)), Entry("B", "base_model.model.q.lora_B.weight", (6, 2))])
    spec = AdapterSpec("area", "f" * 64, "minilm", METHODS["lora"](r=2, alpha=2.0), HeadSpec("lm"), layout)
    for seed in itertools.count(first):
        adapter = Adapter(spec, Tensors(layout, np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)))
        say(seed, Registry(root).publish(adapter, Manifest(round=seed), f"run/{seed}/area").number)
        if seed % 4 == 3:
            say("back", Registry(root).rollback("area", "1").number)


def heard(lines, told):
    """Take in what a worker says that it published; whether any of it was never published before."""
    found = {int(seed): int(number) for seed, number in map(str.split, lines) if seed != "back"}
    new = found.keys() - told.keys()
    told |= found
    return bool(new)


def test_kill_nine_at_any_moment_leaves_every_version_whole(tmp_path, forked):
    root, random_delay, told, first = tmp_path / "registry", random.Random(11), {}, 0
    for _ in range(4):
        worker = forked(lambda say: publish(root, first, say))  # noqa: B023 - used within the iteration
        while not heard([worker.said.readline()], told):
            pass
        time.sleep(random_delay.uniform(0.0, 0.2))
        lines, code = worker.end(kill=True)
        assert code == -9
        heard(lines, told)
        first = max(told, default=0)
        registry = Registry(root)
        assert registry.verify() == ()
        for version in registry.list():
            assert registry.load(version.digest).digest == version.manifest.adapter
    assert len(told) >= 4, "each worker published what none had before"
    for seed, number in told.items():
        found = registry.find("area", f"run/{seed}/area")
        assert (found.number, found.manifest.round) == (number, seed), "what was told is kept, and published once"
    origins = [row["origin"] for row in registry.history("area") if row["action"] == "publish"]
    assert len(origins) == len(set(origins))
    assert [row["number"] for row in registry.history("area")] == list(range(1, len(registry.history("area")) + 1))


@pytest.mark.parametrize("limit", [0, 50, 600, 3_000, 6_000])
def test_no_room_is_one_clear_line_and_loses_nothing(tmp_path, make_adapter, forked, limit):
    """A file-size limit stands for a full disk: writes stop in the key, the tensors (4 kB), or the history."""
    registry = Registry(tmp_path / "registry")
    before = registry.publish(make_adapter(1), Manifest(round=100), "before") if limit else None
    if limit == 600:
        (registry.root / "keys" / "signing.pub").unlink()

    def work(say):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            publish(registry.root, 0, lambda *_words: None, size=500)
        except FedpeftError as fault:
            say(type(fault).__name__, fault.exit_code, fault)

    (line,), code = forked(work).end()
    assert code == 0
    assert line.startswith("StorageError 9 ")
    assert "File too large" in line
    assert registry.verify() == ()
    assert not list(registry.root.rglob("*.partial"))
    if before:
        assert registry.get("area@1") == before
        assert registry.publish(make_adapter(2), Manifest(round=101), "after").number == len(registry.history("area"))


def test_a_folder_without_permission_is_one_clear_line(tmp_path, make_adapter):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be written"):
        Registry(blocked / "registry").publish(make_adapter(1), Manifest())
