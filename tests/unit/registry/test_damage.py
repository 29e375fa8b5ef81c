"""Harm to a registry is named, refused and mended: torn, forged, removed and left over."""

import json
import os

import pytest

from fedpeft.errors import StorageError
from fedpeft.registry import Manifest


def publish(registry, make_adapter, *seeds, task="area"):
    return [registry.publish(make_adapter(seed, task), Manifest(round=seed), f"run/{seed}/{task}") for seed in seeds]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unsign(path):
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "key": "ab" * 32}))


@pytest.mark.parametrize(
    ("name", "harm", "fault"),
    [
        ("adapter_model.safetensors", flip, "adapter_model.safetensors: was changed"),
        ("adapter_config.json", flip, "adapter_config.json: was changed"),
        ("fedpeft.json", os.unlink, "fedpeft.json: missing"),
        ("manifest.json", flip, "manifest.json: was changed"),
        ("manifest.json", os.unlink, "manifest.json: cannot be read"),
        ("manifest.sig", os.unlink, "manifest.sig: missing"),
        ("manifest.sig", unsign, "signed by unknown key abababababababab"),
        ("manifest.sig", lambda path: path.write_bytes(b"{"), "the signature is torn"),
        ("extra.bin", lambda path: path.write_bytes(b"x"), "extra.bin: does not belong to the version"),
    ],
)
def test_every_harm_is_named_refused_and_mended_by_publishing_again(registry, make_adapter, name, harm, fault):
    first, second = publish(registry, make_adapter, 1, 2)
    harm(first.path / name)
    assert any(fault in line for line in registry.verify())
    assert registry.verify("area@2") == ()
    with pytest.raises(StorageError) as caught:
        registry.load("area@1")
    assert len(str(caught.value).splitlines()) == 1
    assert registry.load("area").digest == second.manifest.adapter
    publish(registry, make_adapter, 1)
    assert registry.verify() == ()
    assert registry.load("area@1").digest == first.manifest.adapter
    assert {path.name for path in registry.objects.store.root.iterdir()} == {first.digest, second.digest}


def test_a_forged_manifest_is_caught_by_its_signature(registry, make_adapter):
    """Renaming the folder to the forged manifest's own digest satisfies the hash, not the signature."""
    (version,) = publish(registry, make_adapter, 1)
    forged = Manifest.from_bytes((version.path / "manifest.json").read_bytes().replace(b'"round":1', b'"round":9'))
    target = registry.objects.path(forged.digest)
    version.path.rename(target)
    (target / "manifest.json").write_bytes(forged.to_bytes())
    assert any("does not match what it was made for" in fault for fault in registry.objects.faults(forged.digest))


def test_a_missing_object_is_named(registry, make_adapter):
    (version,) = publish(registry, make_adapter, 1)
    version.path.rename(registry.root / "elsewhere")
    assert registry.verify() == (f"{version.path}: the version's folder is missing",)


@pytest.mark.parametrize("keep", [1, 10, -1])
def test_a_torn_last_line_never_happened_and_is_cut_off(registry, make_adapter, keep):
    publish(registry, make_adapter, 1, 2)
    log = registry.root / "refs" / "area" / "log"
    whole = log.read_bytes()
    last = whole.split(b"\n")[1]
    log.write_bytes(whole[: whole.index(b"\n") + 1] + last[:keep])
    assert [row["number"] for row in registry.history("area")] == [1]
    assert registry.verify() == ()
    again = publish(registry, make_adapter, 2)[0]
    assert again.number == 2
    assert len(registry.history("area")) == 2


@pytest.mark.parametrize("line", [0, 1])
@pytest.mark.parametrize(("old", "new"), [(b'"publish"', b'"rollback"'), (b'"number": ', b'"number": 1'), (b"{", b"[")])
def test_a_changed_history_is_named(registry, make_adapter, line, old, new):
    publish(registry, make_adapter, 1, 2)
    log = registry.root / "refs" / "area" / "log"
    lines = log.read_bytes().split(b"\n")
    lines[line] = lines[line].replace(old, new, 1)
    log.write_bytes(b"\n".join(lines))
    assert any(f"line {line + 1} was changed" in fault for fault in registry.verify())
    with pytest.raises(StorageError, match="restore the file from a backup"):
        registry.get("area")


def test_a_removed_line_breaks_the_chain(registry, make_adapter):
    publish(registry, make_adapter, 1, 2, 3)
    log = registry.root / "refs" / "area" / "log"
    lines = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([lines[0], *lines[2:]]))
    with pytest.raises(StorageError, match="line 2 was changed or is out of order"):
        registry.history("area")


def test_leftovers_of_dead_writers_are_swept(registry, make_adapter):
    publish(registry, make_adapter, 1)
    leftover = registry.objects.store.root / ".abc.partial"
    leftover.mkdir()
    (leftover / "adapter_model.safetensors").write_bytes(b"half")
    assert registry.verify() == ()
    publish(registry, make_adapter, 2)
    assert not leftover.exists()
