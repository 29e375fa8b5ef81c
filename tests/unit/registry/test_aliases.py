"""Aliases are signed, logged moves; pushed versions are judged before anything is published."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import AdapterError, BaseError, PolicyError, StorageError
from fedpeft.registry import Manifest, Registry, aliases
from fedpeft.routing import Card

MOVE = {"number": 1, "task": "area", "alias": "prod", "digest": "a" * 64, "by": "x", "created": "t", "previous": "0" * 64, "signature": ""}


def test_an_alias_moves_and_every_move_is_kept(registry, make_adapter):
    one, two = (registry.publish(make_adapter(seed), Manifest(round=seed)) for seed in (1, 2))
    assert registry.aliases("area") == {}
    registry.alias("area", "prod", "1", "operator:ann")
    assert registry.get("area@prod") == one
    assert registry.alias("area", "prod", "area@1").number == 1, "where it points already, nothing moves"
    registry.alias("area", "canary", two.digest)
    registry.alias("area", "prod", "canary")
    assert registry.aliases("area") == {"canary": two.digest, "prod": two.digest}
    assert [(move.alias, move.digest, move.by) for move in registry.moves("area")] == [
        ("prod", one.digest, "operator:ann"),
        ("canary", two.digest, ""),
        ("prod", two.digest, ""),
    ]
    assert registry.rollback("area", "area@1").digest == one.digest
    assert registry.get("area@latest") == registry.get("area")
    assert registry.resolve("area@prod") == two.digest, "a roll-back moves what is served, not the aliases"
    assert registry.verify() == ()
    assert registry.tasks() == ("area",)


@pytest.mark.parametrize("name", ["latest", "", "1", "Prod", "a/b", "x" * 33, "-a"])
def test_names_that_are_no_aliases(registry, make_adapter, name):
    registry.publish(make_adapter(1), Manifest())
    with pytest.raises(AdapterError, match="cannot be set"):
        registry.alias("area", name, "1")
    assert registry.moves("area") == ()


def test_an_alias_points_at_intact_versions_of_its_own_task_only(registry, make_adapter):
    one = registry.publish(make_adapter(1), Manifest())
    registry.publish(make_adapter(1, "kind"), Manifest())
    for ref, fault in [("kind", "not of 'area'"), ("9", "versions 1 to 1"), ("nowhere", "has no version")]:
        with pytest.raises(AdapterError, match=fault):
            registry.alias("area", "prod", ref)
    (one.path / "fedpeft.json").unlink()
    with pytest.raises(StorageError, match="missing"):
        registry.alias("area", "prod", "1")
    with pytest.raises(AdapterError, match=r"versions 1 to 1 and aliases \[\]"):
        registry.get("area@prod")


@pytest.mark.parametrize(("field", "value"), [("digest", "b" * 64), ("task", "kind"), ("alias", "canary"), ("by", "y"), ("number", 2)])
def test_a_changed_move_is_not_followed(registry, make_adapter, field, value):
    for seed in (1, 2):
        registry.publish(make_adapter(seed), Manifest(round=seed))
    registry.alias("area", "prod", "1")
    path = registry.root / "refs/area/aliases"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}) + "\n")
    with pytest.raises(StorageError, match=r"does not match|was changed"):
        registry.get("area@prod")
    assert registry.verify()


@given(data=st.data())
def test_garbled_moves_are_storage_errors(data, tables):
    line = json.dumps(data.draw(tables(MOVE))).encode()
    with contextlib.suppress(StorageError):
        for move in aliases.parse([line], "area", "x"):
            assert len(move.digest) == 64
            assert "/" not in move.digest


@pytest.fixture
def pushed(tmp_path, make_adapter):
    """A version of another registry: manifest, files, signature, and its key."""
    other = Registry(tmp_path / "other")
    version = other.publish(make_adapter(1), Manifest(round=4, card=Card((1.0, 0.0), 0.25, 100).to_json(), metrics={"accuracy": 0.5}))
    files = other.files(version.digest)
    signature = files.pop("manifest.sig")
    files.pop("manifest.json")
    return version.manifest, files, signature, other.objects.keys.public()


def test_a_trusted_push_is_published_once(registry, pushed):
    manifest, files, signature, key = pushed
    with pytest.raises(PolicyError, match=f"fedpeft adapters trust {key}"):
        registry.accept(manifest, files, signature, "push/1")
    assert registry.tasks() == ()
    registry.objects.keys.trust(key)
    version = registry.accept(manifest, files, signature, "push/1")
    assert (version.action, version.digest, version.origin) == ("push", manifest.digest, "push/1")
    assert registry.accept(manifest, files, signature, "push/1") == version
    assert registry.verify() == ()
    assert registry.base() == "f" * 64


def resigned(manifest, tmp_path):
    keys = Registry(tmp_path / "other").objects.keys
    return manifest, keys.sign(manifest.to_bytes())


@pytest.mark.parametrize(
    ("change", "kind", "fault"),
    [
        ({"base": "e" * 64}, BaseError, "this registry is for ffffffffffff"),
        ({"adapter": "e" * 64}, AdapterError, r"\['adapter'\] are not those"),
        ({"task": "kind"}, AdapterError, r"\['task'\] are not those"),
        ({"ranks": (3,)}, AdapterError, r"\['ranks'\] are not those"),
        ({"task": "../x"}, AdapterError, "cannot be stored"),
        ({"files": {"fedpeft.json": "0" * 64}}, AdapterError, "an adapter has"),
    ],
)
def test_a_signed_manifest_that_is_not_true_is_refused(registry, make_adapter, pushed, tmp_path, change, kind, fault):
    manifest, files, _, key = pushed
    registry.publish(make_adapter(5), Manifest())
    registry.objects.keys.trust(key)
    changed, signature = resigned(replace(manifest, **change), tmp_path)
    with pytest.raises(kind, match=fault):
        registry.accept(changed, files, signature, "push/1")
    assert len(registry.list()) == len(registry.objects.store.names()) == 1


def test_changed_files_and_signatures_are_refused(registry, pushed):
    manifest, files, signature, key = pushed
    registry.objects.keys.trust(key)
    with pytest.raises(StorageError, match=r"fedpeft.json: its SHA-256"):
        registry.accept(manifest, {**files, "fedpeft.json": b"{}"}, signature, "p")
    with pytest.raises(PolicyError, match="does not match"):
        registry.accept(replace(manifest, round=5), files, signature, "p")
    with pytest.raises(PolicyError, match="torn"):
        registry.accept(manifest, files, b"{", "p")
    assert registry.tasks() == ()
