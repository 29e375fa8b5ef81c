"""Examples on disk are those in memory, take no memory, and are made again when anything that they came from has changed."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from fedpeft.bases import BaseSpec, load_base
from fedpeft.bases.spec import HeadSpec
from fedpeft.central.pool import Pool
from fedpeft.central.reading import digest_of, examples
from fedpeft.central.sampling import shares_of, windows
from fedpeft.central.stored import stored
from fedpeft.errors import DataError, StorageError
from fedpeft.tasks import Choice, Classification, Encoded, Generation, Source, read_rows
from fedpeft.tasks.rows import stream_rows
from fedpeft.training.config import CentralConfig, CentralTask
from fedpeft.training.mixing import Equal, Explicit, Proportional, Temperature

STORY = [{"prompt": f"Once {'upon a time ' * (i % 5)}", "completion": f"it slept {i}", "kind": "ab"[i % 2]} for i in range(90)]
ASKED = [{"prompt": f"Is {i} big?", "choices": ["yes", "no", "maybe"][: 2 + i % 2], "answer": i % 2} for i in range(40)]
NAMED = [{"text": f"word {i} " * (1 + i % 7), "label": "xyz"[i % 3]} for i in range(50)]


def shards(folder, rows, count):
    folder.mkdir()
    for number in range(count):
        lines = (json.dumps(row) for row in rows[number::count])
        (folder / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def base(shared_models):
    return load_base(BaseSpec(str(shared_models / "stories260k"), max_tokens=64), "cpu")


def test_streamed_rows_are_the_rows_read_at_once(tmp_path):
    folder = shards(tmp_path / "rows", STORY, 3)
    for settings in ({}, {"where": {"kind": "a"}}, {"limit": 20}, {"columns": {"kind": "label"}, "where": {"label": ["b"]}, "limit": 7}):
        source = Source(path=str(folder), **settings)
        for split in (None, "train", "test"):
            assert list(stream_rows(source, split)) == read_rows(source, split)
    source = Source(path=str(folder), where={"kind": "c"})
    for read in (read_rows, lambda source: list(stream_rows(source))):
        with pytest.raises(DataError, match=r"no row matches where = .* values seen are \{'kind': \['a', 'b'\]\}"):
            read(source)
    (folder / "more.csv").write_text("prompt,completion,kind\na,b,c\n")
    with pytest.raises(DataError, match=r"more\.csv: cannot be streamed"):
        next(stream_rows(source))


def test_a_pool_on_disk_is_the_pool_in_memory(base, tmp_path):
    causal = {
        "story": (Generation("story", metrics=("perplexity",)), STORY, None),
        "asked": (Choice("asked"), ASKED, 9),
    }
    named = {"named": (Classification("named", ("x", "y", "z")), NAMED, 30)}
    for group in (causal, named):
        model = base if group is causal else load_base(BaseSpec("minilm", max_tokens=16), "cpu")
        tasks, held, kept = {}, {}, {}
        for name, (task, rows, cap) in group.items():
            source = Source(path=str(shards(tmp_path / name, rows, 2)))
            tasks[name], held[name] = task, task.encode(read_rows(source, "train")[:cap], model)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fedpeft.central.stored.CHUNK", 7)
                kept[name], none = stored(tmp_path / "encoded", task, source, model, cap)
                assert none is None
            assert stored(tmp_path / "encoded", task, source, model, cap)[0].digest == kept[name].digest
            for field in ("labels", "starts", "owners", "pad"):
                np.testing.assert_array_equal(getattr(held[name], field), getattr(kept[name], field))
            assert all(np.array_equal(one, other) for one, other in zip(held[name].ids, kept[name].ids, strict=True))
            assert np.array_equal(kept[name].ids[-1], held[name].ids[-1])
        one, other = Pool.of(tasks, held), Pool.of(tasks, kept)
        for mixing in (Proportional(), Temperature(3.0), Equal(), Explicit({name: 1.0 + place for place, name in enumerate(tasks)})):
            drawn = [islice(windows(pool, shares_of(pool, mixing), 6, 1), 12) for pool in (one, other)]
            for ours, theirs in zip(*drawn, strict=True):
                assert np.array_equal(ours, theirs)
                parts = one.part(ours), other.part(theirs)
                assert parts[0].owners.equal(parts[1].owners)
                assert parts[0].batch.labels.equal(parts[1].batch.labels)
                assert all(value.equal(parts[1].batch.inputs[name]) for name, value in parts[0].batch.inputs.items())
        assert digest_of(one) != digest_of(other) == digest_of(Pool.of(tasks, kept))


def test_rows_held_out_of_a_stream_are_those_held_out_in_memory(base, tmp_path):
    tables = {
        "story": {"kind": "generation", "cap": 61, "data": {"path": str(shards(tmp_path / "story", STORY, 2))}},
        "asked": {"kind": "choice", "data": {"path": str(shards(tmp_path / "asked", ASKED, 1))}},
    }

    def read(stream, **more):
        tasks = {name: table | {"stream": stream} for name, table in tables.items()}
        return examples(CentralConfig(name="a", output=tmp_path, base={"model": "m"}, tasks=tasks, **more), base)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedpeft.central.stored.CHUNK", 7)
        memory, disk = (read(stream, validation={"patience": 1, "examples": 9}) for stream in (False, True))
    whole = {name: len(kept) for name, (kept, _) in read(False).items()}
    for name, sizes in (("story", (whole["story"] - 9, 9)), ("asked", (whole["asked"] - whole["asked"] // 5, whole["asked"] // 5))):
        assert tuple(map(len, disk[name])) == sizes
        for one, other in zip(memory[name], disk[name], strict=True):
            assert all(np.array_equal(ours, theirs) for ours, theirs in zip(one.ids, other.ids, strict=True))
            assert all(np.array_equal(getattr(one, field), getattr(other, field)) for field in ("labels", "starts", "owners"))
        assert memory[name][1].references == disk[name][1].references
    assert len(disk["story"][1].references) == 9


@dataclass(frozen=True)
class Bytes:
    """A task whose tokens are bytes: what is measured is reading and storing."""

    kind: ClassVar[str] = "bytes"
    head: ClassVar[HeadSpec] = HeadSpec("lm")
    name: str = "bytes"

    def encode(self, rows, base):
        ids = tuple(np.frombuffer(row["text"].encode()[:200], np.uint8).astype(np.int32) for row in rows)
        places = np.arange(len(ids))
        return Encoded(ids, places, np.zeros(len(ids), np.int64), places, 0)


ANY = SimpleNamespace(
    family="causal",
    fingerprint=SimpleNamespace(tokenizer="t"),
    tokenizer=SimpleNamespace(pad_token_id=0),
    spec=BaseSpec("m"),
    config=SimpleNamespace(),
    processor=None,
)


@pytest.fixture
def no_tokenizer(monkeypatch):
    monkeypatch.setattr("fedpeft.central.stored.token_limit", lambda _base: 8)


def test_a_large_file_takes_little_memory(tmp_path, no_tokenizer):
    line = json.dumps({"text": "x" * 2000, "split": "train", "number": "%06d"})
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(line % number + "\n" for number in range(6_000))
    assert (tmp_path / "rows.jsonl").stat().st_size > 12e6
    tracemalloc.start()
    data, held = stored(tmp_path / "encoded", Bytes(), Source(path=str(tmp_path / "rows.jsonl")), ANY, held=64)
    pool = Pool.of({"bytes": Bytes()}, {"bytes": data})
    steps = [pool.part(picks).batch.tokens for picks in islice(windows(pool, {"bytes": 1.0}, 4, 0), 50)]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(data), len(held), sum(steps)) == (6_000 - 64, 64, 50 * 4 * 200)
    assert most < 4e6  # 512 rows in all their forms; the tokens alone are 5 MB


def test_a_change_of_the_file_the_task_or_the_cap_is_seen_and_only_the_last_is_kept(tmp_path, no_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {number}", "split": "train"}) + "\n" for number in range(9)))
    folder, source = tmp_path / "encoded", Source(path=str(path))
    first, _ = stored(folder, Bytes(), source, ANY)
    before = path.stat()
    path.write_text(path.read_text().replace("row 8", "row X"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    second, _ = stored(folder, Bytes(), source, ANY)
    assert (len(first), second.ids[8].tolist()) == (9, list(b"row X"))
    assert len(stored(folder, Bytes(), source, ANY, 4)[0]) == 4
    assert len(list(folder.iterdir())) == 1
    torn = next(folder.iterdir()) / "train" / "ids"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert stored(folder, Bytes(), source, ANY, 4)[0].ids[3].tolist() == list(b"row 3")
    kept, held = stored(folder, Bytes(), source, ANY, held=2)
    assert (len(kept), len(held), len(list(folder.iterdir()))) == (8, 1, 1)
    shutil.rmtree(next(folder.iterdir()) / "held")
    again = stored(folder, Bytes(), source, ANY, held=2)
    assert again[1].ids[0].tolist() == held.ids[0].tolist()
    with pytest.raises(DataError, match=r"4 training rows, of which .validation. holds out a fifth; give 5 or more"):
        stored(folder, Bytes(), source, ANY, 4, 2)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        stored(folder, Bytes(), source, ANY)


def test_no_space_leaves_nothing_behind(tmp_path, no_tokenizer, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "split": "train"}\n')

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedpeft.central.stored.write_synced", full)
    with pytest.raises(StorageError, match="No space left on device; free space"):
        stored(tmp_path / "encoded", Bytes(), Source(path=str(tmp_path / "rows.jsonl")), ANY)
    assert list((tmp_path / "encoded").iterdir()) == []


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(ValueError, match=r"stream = true needs data of \.jsonl files, not 'stdlib'"):
        CentralTask(task=Generation("a"), data=Source(package="stdlib"), stream=True)


def test_faults_of_all_tasks_are_told_at_once_and_those_of_the_file_before_any_row_is_read(base, tmp_path):
    (tmp_path / "torn.jsonl").write_text('{"text": \n')
    shards(tmp_path / "story", STORY, 1)
    paths = {"torn": "torn.jsonl", "story": "story", "absent": "absent.jsonl"}
    tasks = {name: {"kind": "generation", "data": {"path": str(tmp_path / path)}} for name, path in paths.items()}
    config = CentralConfig(name="a", output=tmp_path, base={"model": "m"}, tasks=tasks)
    with pytest.raises(DataError) as told:
        examples(config, base)
    assert [line.split(":")[0] for line in str(told.value).splitlines()] == ["tasks.torn", "tasks.absent"]
    with pytest.raises(ValueError, match=r"a step has 2 examples .* for 3 tasks"):
        CentralConfig(name="a", output=tmp_path, base={"model": "m"}, tasks=tasks, training={"batch_size": 2})
