"""Vision encoders as bases: transformers' own answers on its own pixels, one trunk, quantization, embeddings, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil

from fedpeft.bases import Base, BaseSpec, HeadSpec, load_base, meta_base, module_roles, outline_base
from fedpeft.bases.images import File
from fedpeft.bases.quantize import is_quantized
from fedpeft.bases.spec import LAST
from fedpeft.errors import BaseError, DataError

Folder = Callable[[str], Path]
LABELS = HeadSpec("classification", ("a", "b", "c"))
KINDS = ("ViT", "DeiT", "Beit", "Dinov2", "Swin", "ConvNext")


def load(folder: Path, quantization: str = "none") -> Base:
    return load_base(BaseSpec(str(folder), quantization), "cpu")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> File:
    path = tmp_path_factory.mktemp("scan") / "scan.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 31, 3), np.uint8)).save(path)
    return File(path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_classifier_shares_the_trunk_and_answers_as_transformers_does(vision_folder: Folder, scan: File, kind: str) -> None:
    base, meta = load(vision_folder(kind)), meta_base(BaseSpec(str(vision_folder(kind))))
    assert (base.family, base.width, base.tokenizer, base.fingerprint) == ("vision", 32, None, meta.fingerprint)
    assert base.processor is not None
    assert meta.processor is not None
    assert (base.processor.tokens, base.processor.size) == (meta.processor.tokens, meta.processor.size)
    ours = base.shell(LABELS)
    assert getattr(ours, ours.base_model_prefix) is base.trunk
    assert not any(p.requires_grad for p in ours.parameters())
    peer = AutoModelForImageClassification.from_pretrained(vision_folder(kind), num_labels=3, ignore_mismatched_sizes=True).eval()
    peer.load_state_dict({name: value for name, value in ours.state_dict().items() if name.startswith("classifier")}, strict=False)
    theirs = base.processor.inner(images=Image.open(scan), return_tensors="pt")
    pixels = base.processor.stack([scan])
    assert pixels.dtype == torch.uint8
    with torch.no_grad():
        wanted = peer(**theirs)
        torch.testing.assert_close(ours(pixel_values=pixels).logits, wanted.logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours(**theirs).logits, wanted.logits)  # numbers are left as they are
        states = getattr(peer, peer.base_model_prefix)(**theirs)[0]
    mean = (states.flatten(2).mean(2) if states.dim() == 4 else states.mean(1))[0].numpy()
    np.testing.assert_allclose(base.embed([scan])[0], mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-5)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in meta.shell(LABELS).named_parameters()]
    roles = module_roles(outline_base(base.spec).model)
    assert {name: len(found) for name, found in roles.items() if name != "mlp"} == {
        "attention": 0 if kind == "ConvNext" else 8,
        "outside": 0,
        "head": 1,
    }


def test_embeddings_and_what_modules_read_do_not_depend_on_company_or_form(vision_folder: Folder, scan: File) -> None:
    base = load(vision_folder("ViT"))
    import base64

    url = f"data:image/png;base64,{base64.b64encode(Path(scan).read_bytes()).decode()}"
    other = Image.new("L", (5, 9), 40)
    path = Path(scan).with_name("other.jpg")
    other.save(path)
    found = base.embed([scan, File(path), url])
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_allclose(base.embed([scan])[0], found[0], rtol=1e-5, atol=1e-6)
    seen = base.watch(url, ["vit.layers.1.attention.q_proj", LAST])
    assert [value.shape for value in seen.values()] == [(17, 32), (17, 32)]
    mean = seen[LAST].mean(0)
    np.testing.assert_allclose(mean / np.linalg.norm(mean), found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "quantization"), [("ViT", "int8"), ("Beit", "bf16"), ("Swin", "ao-int8"), ("ConvNext", "nf4")])
def test_the_blocks_are_quantized_and_answer_nearly_alike(vision_folder: Folder, scan: File, kind: str, quantization: str) -> None:
    base, plain = load(vision_folder(kind), quantization), load(vision_folder(kind))
    roles = module_roles(base.model)
    small = {name for name, module in base.model.named_modules() if is_quantized(module)}
    assert small == (set() if quantization == "bf16" else set(roles["attention"] + roles["mlp"]))
    assert base.processor is not None
    with torch.no_grad():
        found, wanted = (one.shell(LABELS)(pixel_values=base.processor.stack([scan])).logits for one in (base, plain))
    assert found.dtype == torch.float32
    assert float((found - wanted).norm() / wanted.norm()) < (0.4 if quantization == "nf4" else 0.05)


def spoilt(folder: Path, to: Path, file: str, **settings: object) -> Path:
    copy = Path(shutil.copytree(folder, to))
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | settings))
    return copy


PROCESSOR = "preprocessor_config.json"


@pytest.mark.parametrize(
    ("kind", "file", "settings", "says"),
    [
        ("ResNet", "config.json", {}, "ResNetForImageClassification has no linear layer in its blocks"),
        ("ViT", PROCESSOR, {"size": {"height": 24, "width": 16}}, r"does not take what its preprocessor_config.json gives, \[3, 24, 16\]"),
        ("ViT", PROCESSOR, {"size": {"shortest_edge": 16}}, "gives images of different sizes"),
        ("ViT", PROCESSOR, {"do_resize": False}, "gives images of different sizes"),
        ("ViT", PROCESSOR, {"image_processor_type": "MobileViTImageProcessor"}, "does more than resize, crop, rescale and normalize"),
        ("ViT", PROCESSOR, {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}}, "cannot be used"),
        ("ViT", PROCESSOR, {"image_std": [0, 1, 1]}, "does more|cannot be applied"),
    ],
)
def test_what_is_no_vision_encoder_or_makes_other_images_is_refused(
    vision_folder: Folder, tmp_path: Path, kind: str, file: str, settings: dict[str, object], says: str
) -> None:
    folder = spoilt(vision_folder(kind), tmp_path / "m", file, **settings)
    with pytest.raises(BaseError, match=says) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_int8_is_refused_where_layers_read_maps_and_generation_and_foreign_paths_anywhere(vision_folder: Folder, scan: File) -> None:
    with pytest.raises(BaseError, match="'int8' takes rows of tokens, and ConvNextForImageClassification keeps maps"):
        load(vision_folder("ConvNext"), "int8")
    base = load(vision_folder("ViT"))
    with pytest.raises(BaseError, match="generates no text"):
        base.shell(HeadSpec("lm"))
    for text in ("what is this?", str(scan), "https://example.org/a.png"):  # what somebody sends never opens a file
        with pytest.raises(DataError, match="holds no image, and this base reads images"):
            base.embed([text])


def test_the_fingerprint_covers_how_images_are_made(vision_folder: Folder, tmp_path: Path) -> None:
    own = vision_folder("ViT")
    same, other = (spoilt(own, tmp_path / f"{n}", PROCESSOR, **{key: n}) for key, n in (("_name_or_path", 1), ("resample", 3)))
    prints = [meta_base(BaseSpec(str(folder))).fingerprint for folder in (own, same, other)]
    assert prints[0] == prints[1]
    assert prints[2] == replace(prints[0], tokenizer=prints[2].tokenizer) != prints[0]
    (same / PROCESSOR).unlink()
    with pytest.raises(BaseError, match=r"has no tokenizer .*, nor preprocessor_config.json for images"):
        load(same)


@pytest.mark.parametrize(
    "inner",
    [
        BeitImageProcessorPil(size={"height": 18, "width": 18}, crop_size={"height": 16, "width": 16}, do_center_crop=True),
        BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
        DeiTImageProcessorPil(size={"height": 20, "width": 20}, crop_size={"height": 16, "width": 16}),
        ConvNextImageProcessorPil(size={"shortest_edge": 16}),
    ],
    ids=lambda inner: type(inner).__name__,
)
def test_processors_of_other_kinds_give_their_own_numbers(vision_folder: Folder, tmp_path: Path, scan: File, inner: object) -> None:
    folder = Path(shutil.copytree(vision_folder("ViT"), tmp_path / "m"))
    inner.save_pretrained(folder)  # type: ignore[attr-defined]
    base = meta_base(BaseSpec(str(folder)))
    assert base.processor is not None
    wanted = base.processor.inner(images=Image.open(scan), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(base.processor.values(base.processor.stack([scan]), torch.float32), wanted, rtol=1e-5, atol=1e-5)
