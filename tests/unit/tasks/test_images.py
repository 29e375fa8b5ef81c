"""Rows of images: the forms they come in, their pixels, what is broken or too large, and what a base of the other kind says."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedpeft.bases import Base, BaseSpec, meta_base
from fedpeft.bases.images import File, picture
from fedpeft.errors import BaseError, DataError
from fedpeft.routing.ngrams import counted
from fedpeft.tasks import Choice, Classification, Generation, Source, read_rows
from fedpeft.tasks.arrange import subset
from fedpeft.tasks.images import Images, Kept
from fedpeft.tasks.images import written as written_as
from fedpeft.tasks.rows import stream_rows

TASK = Classification("scans", ("ill", "well"))


@pytest.fixture(scope="module")
def base(vision_folder: Callable[[str], Path]) -> Base:
    return meta_base(BaseSpec(str(vision_folder("ViT"))))


def drawn(seed: int, shape: tuple[int, ...] = (20, 24, 3)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def coded(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Two labels, three images each."""
    for number in range(6):
        path = tmp_path / "scans" / ("ill", "well")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(coded(drawn(number)))
    return tmp_path / "scans"


def test_every_form_of_a_row_gives_the_same_pixels(base: Base, scans: Path, tmp_path: Path) -> None:
    by_label = read_rows(Source(path=str(scans)))
    assert [row["label"] for row in by_label] == ["ill"] * 3 + ["well"] * 3
    files = [Path(row["image"]) for row in by_label]
    lists = tmp_path / "lists"
    lists.mkdir()

    def written(name: str, images: list[object]) -> list[dict[str, object]]:
        path, rows = lists / name, [{"image": image, "label": row["label"]} for image, row in zip(images, by_label, strict=True)]
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("\n".join(json.dumps(row, default=written_as) for row in rows))
        return read_rows(Source(path=str(path)))

    text = [base64.b64encode(file.read_bytes()).decode() for file in files]
    forms = [
        by_label,
        written("paths.jsonl", [f"../{file.relative_to(tmp_path)}" for file in files]),
        written("rooted.jsonl", [str(file) for file in files]),
        written("urls.jsonl", [f"data:image/png;base64,{one}" for one in text]),
        written("bare.jsonl", text),
        written("bytes.parquet", [{"bytes": file.read_bytes(), "path": file.name} for file in files]),
        written("copied.jsonl", [{"bytes": file.read_bytes(), "path": file.name} for file in files]),
        written("hub.parquet", [{"bytes": None, "path": f"../{file.relative_to(tmp_path)}"} for file in files]),
        list(stream_rows(Source(path=str(lists / "paths.jsonl")))),
    ]
    assert base.processor is not None
    wanted = [base.processor.inner(images=Image.open(file), do_rescale=False, do_normalize=False)["pixel_values"][0] for file in files]
    for rows in forms:
        data = TASK.encode(rows, base)
        assert (data.labels.tolist(), data.lengths.tolist()) == ([0] * 3 + [1] * 3, [17] * 6)
        np.testing.assert_array_equal(np.stack(list(data.ids)), np.stack(wanted))
        texts = [TASK.text_of(row) for row in rows]  # what routing embeds
        np.testing.assert_array_equal(base.processor.stack(texts).numpy(), np.stack(wanted))


def test_splits_are_folders_or_of_the_names_alone_wherever_they_lie(scans: Path, tmp_path: Path) -> None:
    before = [Path(row["image"]).name for row in read_rows(Source(path=str(scans)), "train")]
    scans.rename(tmp_path / "b")
    assert [Path(row["image"]).name for row in read_rows(Source(path=str(tmp_path / "b")), "train")] == before
    (tmp_path / "c" / "train").mkdir(parents=True)
    (tmp_path / "b" / "ill").rename(tmp_path / "c" / "train" / "ill")
    (tmp_path / "b").rename(tmp_path / "c" / "validation")
    found = {split: read_rows(Source(path=str(tmp_path / "c")), split) for split in ("train", "test")}
    assert {split: {row["label"] for row in rows} for split, rows in found.items()} == {"train": {"ill"}, "test": {"well"}}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no file of rows; .*; nor images by label, as in LABEL/\*.png"):
        read_rows(Source(path=str(tmp_path / "empty")))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (coded(drawn(0))[:300], "its image is broken"),
        (coded(drawn(0), "JPEG")[:300], "its image is broken"),
        (b"not an image", "it is no PNG or JPEG"),
        (coded(drawn(0), "GIF"), "it is no PNG or JPEG"),
        (BOMB, "pixels; at most 67,108,864 are read"),
        (coded(Image.new("1", (8200, 8200))), "8200 x 8200 pixels; at most 67,108,864 are read"),
        (None, "cannot be read: No such file"),
    ],
    ids=["torn-png", "torn-jpeg", "text", "gif", "bomb", "large", "missing"],
)
def test_a_broken_image_is_named_by_file_and_row_in_one_line(base: Base, scans: Path, body: bytes | None, says: str) -> None:
    rows = read_rows(Source(path=str(scans)))
    path = Path(rows[2]["image"])
    path.unlink()
    if body is not None:
        path.write_bytes(body)
    with pytest.raises(DataError, match=says) as caught:
        TASK.encode(rows, base)
    assert str(caught.value).startswith(f"row 3: {path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


@settings(max_examples=60)
@given(st.data())
def test_spoilt_bytes_are_an_image_or_one_fault(data: st.DataObject) -> None:
    body = bytearray(coded(drawn(1), data.draw(st.sampled_from(["PNG", "JPEG"]))))
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert picture(bytes(body[: data.draw(st.integers(1, len(body)))])).mode == "RGB"
    except DataError as fault:
        assert "\n" not in str(fault)  # noqa: PT017


def test_pictures_are_upright_eight_bit_and_without_alpha(tmp_path: Path) -> None:
    image = drawn(2, (6, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    assert np.array_equal(np.asarray(picture(coded(image, exif=exif))), np.rot90(np.asarray(image), -1))
    deep = (np.arange(24, dtype=np.uint16) * 2730).reshape(6, 4)
    assert np.array_equal(np.asarray(picture(coded(Image.fromarray(deep))))[..., 0], deep >> 8)
    for mode in ("L", "LA", "RGBA", "P", "1"):
        assert picture(coded(image.convert(mode))).mode == "RGB"
    assert picture(coded(image.convert("P"), transparency=b"\0\x7f")).mode == "RGB"
    assert picture(coded(image.convert("CMYK"), "JPEG")).size == (4, 6)


def test_texts_and_images_need_a_base_of_their_kind(base: Base, scans: Path, minilm: Base) -> None:
    images, texts = read_rows(Source(path=str(scans))), [{"text": "a cough", "label": "ill"}]
    with pytest.raises(DataError, match="row 1: holds an image, and base minilm reads text; give rows of text, or a vision base"):
        TASK.encode(images, minilm)
    with pytest.raises(DataError, match=r"row 1: has no image, and the base reads images; fields are \['label', 'text'\]"):
        TASK.encode(texts, base)
    with pytest.raises(DataError, match="row 1: holds both 'image' and 'text'; a vision base reads images alone"):
        TASK.encode([images[0] | texts[0]], base)
    with pytest.raises(DataError, match="row 1: field 'image' is 7; give a path"):
        TASK.encode([{"image": 7, "label": "ill"}], base)
    with pytest.raises(DataError, match=r"row 1 \('.*/ill/0.png'\): unknown label 'worse'"):
        TASK.encode([{**images[0], "label": "worse"}], base)
    for task in (Generation("say"), Choice("pick")):
        with pytest.raises(BaseError, match="is of family 'vision'"):
            task.encode([{"prompt": "a", "completion": "b", "choices": ["a", "b"], "answer": 0}], base)


def test_what_is_kept_is_bounded_and_shared_with_parts(base: Base, scans: Path) -> None:
    data = TASK.encode(read_rows(Source(path=str(scans))), base)
    assert isinstance(data.ids, Images)
    assert data.ids.kept.room == 2**29 - 6 * 3 * 16 * 16
    part = subset(data, np.array([1, 4]), indexed=False)
    assert isinstance(part.ids, Images)
    assert part.ids[1] is data.ids[4] is data.ids[2:][2]
    small = Images(data.ids.processor, data.ids.sources, range(6), Kept(room=2000))
    assert np.array_equal(np.stack(list(small)), np.stack(list(data.ids)))
    assert len(small.kept.found) == 2
    Path(data.ids.sources[5]).unlink()  # type: ignore[arg-type]
    assert len(list(data.ids)) == 6
    with pytest.raises(DataError, match="No such file"):
        list(small)


def test_names_of_files_are_not_counted_as_texts(scans: Path) -> None:
    texts = [TASK.text_of(row) for row in read_rows(Source(path=str(scans)))]
    assert not counted([*texts, "data:image/png;base64,aGVsbG8="]).any()
    assert counted(["a cough"]).any()


def test_only_this_machines_own_rows_name_files(scans: Path) -> None:
    path = read_rows(Source(path=str(scans)))[0]["image"]
    assert isinstance(path, File)
    with pytest.raises(DataError, match="holds no image"):
        picture(str(path))
