"""Reading rows: every file form gives the same rows, and every fault names what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import DataError
from fedpeft.tasks import Row, Source, read_rows
from fedpeft.tasks.split import row_key, split_of

ROWS: list[Row] = [{"text": f"row {number}, naïve “text”", "label": str(number % 3), "client": "ab"[number % 2]} for number in range(60)]


def written(folder: Path, suffix: str, rows: list[Row] = ROWS) -> Path:
    path = folder / f"rows{suffix}"
    if suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps({"data": rows}), encoding="utf-8-sig")
    elif suffix in (".csv", ".tsv"):
        between = "\t" if suffix == ".tsv" else ","
        lines = [between.join(rows[0]), *(between.join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_file_form_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    assert read_rows(Source(path=str(written(tmp_path, suffix)))) == ROWS


def test_split_by_hash_is_a_partition_that_does_not_depend_on_order(tmp_path: Path) -> None:
    forward = Source(path=str(written(tmp_path, ".jsonl")))
    train, test = read_rows(forward, "train"), read_rows(forward, "test")
    assert len(train) + len(test) == len(ROWS)
    assert 4 <= len(test) <= 24
    backward = Source(path=str(written(tmp_path, ".json", ROWS[::-1])))
    assert read_rows(backward, "test") == test[::-1]


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=4), st.sampled_from(["train", "test"]))
def test_the_split_of_a_row_ignores_field_order_and_a_split_field(row: Row, name: str) -> None:
    row.pop("split", None)
    assert split_of(row_key(row)) == split_of(row_key(dict(reversed(row.items())) | {"split": name}))


def test_a_split_column_decides_and_val_stands_in_for_test(tmp_path: Path) -> None:
    rows = [row | {"split": "val" if place < 20 else "train"} for place, row in enumerate(ROWS)]
    source = Source(path=str(written(tmp_path, ".jsonl", rows)))
    assert read_rows(source, "test") == rows[:20]
    assert read_rows(source, "train") == rows[20:]
    assert read_rows(source) == rows


def test_where_columns_and_limit(tmp_path: Path) -> None:
    path = str(written(tmp_path, ".jsonl"))
    rows = read_rows(Source(path=path, where={"client": "a", "label": ["0", "2"]}, columns={"text": "sentence"}, limit=10))
    assert len(rows) == 10
    assert {(row["client"], row["label"]) for row in rows} == {("a", "0"), ("a", "2")}
    assert set(rows[0]) == {"sentence", "label", "client"}
    assert rows == read_rows(Source(path=path, where={"client": "a", "label": ["0", "2"]}, columns={"text": "sentence"}, limit=10))


def test_a_limit_is_spread_over_a_sorted_file(tmp_path: Path) -> None:
    rows = sorted(ROWS, key=lambda row: row["label"])
    chosen = read_rows(Source(path=str(written(tmp_path, ".jsonl", rows)), limit=20))
    assert {row["label"] for row in chosen} == {"0", "1", "2"}
    assert [rows.index(row) for row in chosen] == sorted(rows.index(row) for row in chosen)


def content(folder: Path, name: str, data: bytes) -> Source:
    (folder / name).write_bytes(data)
    return Source(path=str(folder / name))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON at character"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl, line 2: a list, expected an object"),
        ("a.jsonl", '{"text": "naïve"}'.encode("latin-1"), r"not UTF-8 at byte 12; save the file as UTF-8"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: no rows; the data is empty"),
        ("a.json", b"", r"no rows"),
        ("a.json", b'{"text": "x"}', r"expected a list of objects"),
        ("a.json", b"[3]", r"item 1: a int"),
        ("a.csv", b"text,label\na,b,c\n", r"line 2: 3 fields, the header has 2"),
        ("a.csv", b"text,label\na\n", r"line 2: 1 fields, the header has 2"),
        ("a.csv", b'text,label\n"a,b\n', r"not valid CSV"),
        ("a.csv", b"text,label\n", r"no rows"),
        ("a.parquet", b"PAR?", r"not a Parquet file"),
        ("a.txt", b"hello", r"unknown kind of file '\.txt'; give one of \['\.csv'"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as fault:
        read_rows(content(tmp_path, name, data))
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("header", ["text;label", "text\tlabel", "text,label"])
def test_a_spreadsheets_separator_is_the_headers(tmp_path: Path, header: str) -> None:
    sign = header.removeprefix("text").removesuffix("label")
    source = content(tmp_path, "a.csv", f"\ufeff{header}\na{sign}b\n".encode())
    assert read_rows(source) == [{"text": "a", "label": "b"}]


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_rows(Source(path=str(tmp_path / "none.jsonl")))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="holds no file of rows; its names must end in one of"):
        read_rows(Source(path=str(tmp_path / "folder.jsonl")))


def test_wrong_filters_name_what_was_seen(tmp_path: Path) -> None:
    path = str(written(tmp_path, ".jsonl"))
    with pytest.raises(DataError, match=r"where names \['site'\], which no row has; columns seen are \['client', 'label', 'text'\]"):
        read_rows(Source(path=path, where={"site": "a"}))
    with pytest.raises(DataError, match=r"columns names \['body'\]"):
        read_rows(Source(path=path, columns={"body": "text"}))
    with pytest.raises(DataError, match=r"no row matches .* values seen are {'client': \['a', 'b'\]}"):
        read_rows(Source(path=path, where={"client": "c"}))
    with pytest.raises(DataError, match="unknown split 'dev'"):
        read_rows(Source(path=path), "dev")
    only = written(tmp_path, ".json", [ROWS[0] | {"split": "train"}])
    with pytest.raises(DataError, match=r"no row in split 'test' among 1; splits seen are \['train'\]"):
        read_rows(Source(path=str(only)), "test")


@pytest.mark.parametrize(
    "given_", [{}, {"path": "a.csv", "hub": "b/c"}, {"path": "a.csv", "limit": 0}, {"package": "numpy"}, {"paht": "a"}]
)
def test_a_source_is_checked_when_it_is_written(given_: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"exactly one of|greater than|stdlib|Extra inputs"):
        Source.model_validate(given_)


def test_hub_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fedpeft\[hub\]'"):
        read_rows(Source(hub="org/name"))


def test_shared_data_is_read_and_split_as_its_manifest_says(shared_data: Path) -> None:
    for entry in json.loads((shared_data / "MANIFEST.json").read_text()):
        if entry["file"] in ("banking77.jsonl", "svamp.jsonl"):
            source = Source(path=str(shared_data / entry["file"]))
            assert {name: len(read_rows(source, name)) for name in ("train", "test")} == {
                name: entry["splits"][name] for name in ("train", "test")
            }
