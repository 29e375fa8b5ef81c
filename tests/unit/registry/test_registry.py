"""What the registry promises: names, history, idempotency, signatures, and that every fault is named."""

import json
import threading
from dataclasses import replace

import pytest

from fedpeft.adapters import load
from fedpeft.errors import AdapterError, StorageError
from fedpeft.registry import Manifest, Registry
from fedpeft.routing import Card

LINEAGE = Manifest(
    task_settings={"kind": "classification", "labels": ["x", "y", "z"]},
    quantization=("int8", "none"),
    scheme="alternating",
    federation="demo",
    round=3,
    parents=("a" * 64,),
    metrics={"accuracy": 0.5, "perplexity": float("inf")},
    weight=2.5,
    examples=100,
    sites=3,
    card=Card((1.0, 0.0), 0.25, 100).to_json(),
)


def publish(registry, make_adapter, *seeds, task="area"):
    return [registry.publish(make_adapter(seed, task), Manifest(round=seed), f"run/{seed}/{task}") for seed in seeds]


def test_a_version_holds_the_whole_story(registry, make_adapter):
    adapter = make_adapter(1)
    version = registry.publish(adapter, LINEAGE, "run/3/area")
    manifest = version.manifest
    assert (version.task, version.number, version.origin, version.action) == ("area", 1, "run/3/area", "publish")
    assert (manifest.task, manifest.base, manifest.base_model, manifest.ranks) == ("area", "f" * 64, "minilm", (2,))
    assert manifest.method["kind"] == "lora"
    assert manifest.metrics == {"accuracy": 0.5}
    assert manifest.adapter == adapter.digest
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors", "fedpeft.json", "router.safetensors"}
    assert (manifest.scheme, manifest.round, manifest.parents, manifest.sites) == ("alternating", 3, ("a" * 64,), 3)
    assert Card.from_json(manifest.card) == Card((1.0, 0.0), 0.25, 100)
    assert Manifest.from_bytes((version.path / "manifest.json").read_bytes()).to_bytes() == manifest.to_bytes()
    assert registry.load("area").digest == adapter.digest
    assert registry.verify() == ()


def test_neither_clock_nor_machine_enters_the_digest(tmp_path, make_adapter):
    versions = [Registry(tmp_path / name).publish(make_adapter(1), LINEAGE, name) for name in ("one", "two")]
    assert versions[0].digest == versions[1].digest
    keys = [(tmp_path / name / "keys" / "signing.pub").read_bytes() for name in ("one", "two")]
    assert keys[0] != keys[1]
    table = json.loads((versions[0].path / "manifest.json").read_bytes())
    assert not {"created", "time", "date", "host"} & set(table)


def test_a_manifest_of_old_keeps_its_digest_and_a_new_one_says_where_texts_were_cut():
    told = replace(LINEAGE, metrics={})
    old = told.to_bytes()
    assert b"max_tokens" not in old
    assert Manifest.from_bytes(old) == told
    assert Manifest.from_bytes(old).to_bytes() == old
    new = replace(told, max_tokens=1024)
    assert Manifest.from_bytes(new.to_bytes()).max_tokens == 1024
    with pytest.raises(StorageError, match="max_tokens"):
        Manifest.from_json(new.to_json() | {"max_tokens": "many"})


def test_numbers_count_per_task_and_references_resolve(registry, make_adapter):
    first, second = publish(registry, make_adapter, 1, 2)
    (other,) = publish(registry, make_adapter, 7, task="kind")
    assert [v.number for v in (first, second, other)] == [1, 2, 1]
    assert registry.resolve("area") == registry.resolve("area@2") == second.digest
    assert registry.get("area@1").digest == first.digest
    assert registry.get(first.digest) == first
    for prefix in (first.digest[:12], first.manifest.adapter[:12]):
        assert registry.get(f"sha256:{prefix}") == first
    assert registry.tasks() == ("area", "kind")
    assert [v.number for v in registry.list()] == [1, 2, 1]
    assert registry.list("kind") == (other,)
    assert registry.find("area", "run/1/area") == first
    assert registry.find("area", "run/9/area") is None


@pytest.mark.parametrize(
    ("ref", "fault"),
    [
        ("verb", r"task 'verb' has no version in .*; tasks are \['area'\]"),
        ("area@3", "task 'area' has versions 1 to 2"),
        ("area@0", "versions 1 to 2"),
        ("area@x", "versions 1 to 2"),
        ("sha256:", "no such version"),
        ("sha256:zz", "no such version"),
        ("0" * 64, "no such version"),
        ("../area", "cannot be stored"),
        ("..", "cannot be stored"),
        ("a/b", "cannot be stored"),
        ("", "cannot be stored"),
    ],
)
def test_a_reference_to_nothing_says_what_there_is(registry, make_adapter, ref, fault):
    publish(registry, make_adapter, 1, 2)
    with pytest.raises(AdapterError, match=fault):
        registry.get(ref)


def test_an_ambiguous_prefix_lists_the_candidates(registry, make_adapter):
    versions, by_first = publish(registry, make_adapter, *range(20)), {}
    for version in versions:
        by_first.setdefault(version.digest[0], []).append(version)
    twins = next(group for group in by_first.values() if len(group) > 1)
    with pytest.raises(AdapterError, match="give more digits") as caught:
        registry.get(f"sha256:{twins[0].digest[0]}")
    for version in twins[:2]:
        assert f"area@{version.number} sha256:{version.digest[:16]}" in str(caught.value)


def test_publishing_again_is_the_same_version(registry, make_adapter):
    one = registry.publish(make_adapter(1), LINEAGE, "run/1/area")
    again = registry.publish(make_adapter(1), LINEAGE, "run/1/area")
    assert again == one
    assert len(registry.history("area")) == 1
    fresh = registry.publish(make_adapter(1), LINEAGE, "other/1/area")
    assert (fresh.number, fresh.digest) == (2, one.digest)
    assert len(registry.objects.store.names()) == 1
    registry.publish(make_adapter(2), LINEAGE, "run/2/area")
    assert registry.publish(make_adapter(1), LINEAGE, "run/1/area") == one
    assert registry.publish(make_adapter(1), LINEAGE).number == 2, "without an origin, equal content is the same act"
    with pytest.raises(AdapterError, match=r"'run/1/area' published .* as area@1, now it gives"):
        registry.publish(make_adapter(3), LINEAGE, "run/1/area")


def test_rollback_is_a_new_event_that_points_back(registry, make_adapter):
    first, second = publish(registry, make_adapter, 1, 2)
    back = registry.rollback("area", "area@1")
    assert (back.number, back.digest, back.action) == (3, first.digest, "rollback")
    assert registry.resolve("area") == first.digest
    assert registry.get("area@2") == second
    assert [row["action"] for row in registry.history("area")] == ["publish", "publish", "rollback"]
    assert registry.list("area") == (first, second)
    assert registry.rollback("area", "2").digest == second.digest
    publish(registry, make_adapter, 7, task="kind")
    with pytest.raises(AdapterError, match="version of task 'kind', not of 'area'"):
        registry.rollback("area", "kind")
    (third,) = publish(registry, make_adapter, 3)
    assert third.number == 5
    assert registry.verify() == ()


def test_export_is_a_folder_that_loads_elsewhere(registry, make_adapter, tmp_path):
    (version,) = publish(registry, make_adapter, 1)
    registry.export("area@1", tmp_path / "out" / "area")
    assert load(tmp_path / "out" / "area").digest == version.manifest.adapter
    assert {path.name for path in (tmp_path / "out" / "area").iterdir()} == {*version.manifest.files, "manifest.json", "manifest.sig"}
    with pytest.raises(StorageError, match="exists already"):
        registry.export("area@1", tmp_path / "out" / "area")


def test_pull_copies_verified_versions_and_trusts_their_signer(registry, make_adapter, tmp_path):
    publish(registry, make_adapter, 1, 2)
    mine = Registry(tmp_path / "mine")
    publish(mine, make_adapter, 9)
    pulled = mine.pull(registry, "area@1")
    assert (pulled.number, pulled.action, pulled.digest) == (2, "pull", registry.resolve("area@1"))
    assert mine.pull(registry, "area@1") == pulled
    assert mine.load("area").digest == make_adapter(1).digest
    assert mine.verify() == ()
    (registry.get("area@2").path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match="was changed"):
        mine.pull(registry, "area@2")
    assert len(mine.history("area")) == 2


def test_the_key_is_private_made_once_and_checked(registry, make_adapter):
    publish(registry, make_adapter, 1)
    private, public = registry.root / "keys" / "signing.key", registry.root / "keys" / "signing.pub"
    assert private.stat().st_mode & 0o777 == 0o600
    before = private.read_bytes(), public.read_bytes()
    publish(registry, make_adapter, 2)
    assert (private.read_bytes(), public.read_bytes()) == before
    assert b"PRIVATE" in before[0]
    assert b"PUBLIC" in before[1]
    private.chmod(0o644)
    assert any("others may read the signing key (mode 644)" in fault for fault in registry.verify())
    private.unlink()
    with pytest.raises(StorageError, match="the signing key is gone"):
        publish(registry, make_adapter, 3)
    assert registry.verify() == ()
    private.write_bytes(b"junk")
    with pytest.raises(StorageError, match="not a private key"):
        publish(registry, make_adapter, 3)
    private.write_bytes(before[0])
    public.unlink()
    publish(registry, make_adapter, 3)
    assert public.read_bytes() == before[1]


def test_writers_take_turns(registry, make_adapter):
    def work(task):
        for seed in range(5):
            Registry(registry.root).publish(make_adapter(seed, "area"), Manifest(round=seed), f"{task}/{seed}")

    threads = [threading.Thread(target=work, args=(f"writer{place}",)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row["number"] for row in registry.history("area")] == list(range(1, 21))
    assert len({row["origin"] for row in registry.history("area")}) == 20
    assert registry.verify() == ()


def test_values_that_are_not_finite_are_not_published(registry, make_adapter):
    adapter = make_adapter(1)
    adapter.tensors.flat[0] = float("nan")
    with pytest.raises(AdapterError, match="NaN"):
        registry.publish(adapter, LINEAGE)
    assert not registry.root.exists()


def test_an_empty_registry_answers(registry):
    assert registry.tasks() == registry.list() == registry.verify() == ()
    assert registry.find("area", "x") is None
    with pytest.raises(AdapterError, match=r"task 'area' has no version in .*; tasks are \[\]"):
        registry.get("area")


def test_a_manifest_of_another_version_is_refused():
    with pytest.raises(StorageError, match="not of format 1"):
        Manifest.from_bytes(b'{"format": 2}')
    with pytest.raises(StorageError, match="are missing or unknown"):
        Manifest.from_bytes(b'{"format": 1, "wings": 2}')
    with pytest.raises(StorageError, match="torn"):
        Manifest.from_bytes(b"{")
