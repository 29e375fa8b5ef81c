from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.bases import BaseSpec, HeadSpec, load_base, module_roles
from fedpeft.bases.quantize import compute_dtype, is_quantized
from fedpeft.errors import BaseError

Tiny = Callable[[str], Path]
LABELS = HeadSpec("classification", ("a", "b"))
KINDS = ["nf4", "int8", "ao-int8"]
IDS = torch.tensor([[3, 10, 11, 12, 13], [3, 20, 21, 22, 23]])


def spec(folder: Path, quantization: str) -> BaseSpec:
    return BaseSpec(str(folder), quantization, max_tokens=32)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_exactly_the_blocks_are_quantized(tiny_model: Tiny, kind: str, quantization: str) -> None:
    model = load_base(spec(tiny_model(kind), quantization), "cpu").shell(LABELS)
    roles = module_roles(model)
    small = {name for name, module in model.named_modules() if is_quantized(module)}
    assert small == set(roles["attention"] + roles["mlp"])
    assert not any(p.requires_grad for p in model.parameters())
    assert model.get_submodule(roles["head"][0]).state_dict()


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_answers_stay_close_and_gradients_reach_the_inputs(tiny_model: Tiny, kind: str, quantization: str) -> None:
    """Also after a forward in eval mode, which makes bitsandbytes repack 4-bit weights on some CPUs."""
    plain = load_base(spec(tiny_model(kind), "none"), "cpu").shell(LABELS)
    model = load_base(spec(tiny_model(kind), quantization), "cpu").shell(LABELS)
    with torch.no_grad():
        want, first = plain(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert torch.allclose(want, first, atol=0.15)
    for module in model.modules():
        module.training = True
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    vectors, reference = (m.get_input_embeddings()(IDS).requires_grad_() for m in (model, plain))
    model(inputs_embeds=vectors).logits.pow(2).sum().backward()
    plain(inputs_embeds=reference).logits.pow(2).sum().backward()
    cosine = torch.nn.functional.cosine_similarity(vectors.grad.flatten(), reference.grad.flatten(), dim=0)
    assert cosine > 0.7
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, first)


@pytest.mark.parametrize("quantization", KINDS)
def test_a_missing_library_is_named(tiny_model: Tiny, quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("bitsandbytes", "torchao") else found(name, *rest)
    )
    with pytest.raises(BaseError, match=r"needs (bitsandbytes|torchao); run pip install"):
        load_base(spec(tiny_model("bert"), quantization), "cpu")


@pytest.mark.parametrize(("capability", "half"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_card_without_units_for_bf16_computes_in_fp16(
    monkeypatch: pytest.MonkeyPatch, kind: str, capability: object, half: object
) -> None:
    """torch itself says that a Turing card supports bf16, which it emulates."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compute_dtype(spec(Path("m"), kind), "cuda:0") == half
    assert compute_dtype(spec(Path("m"), kind), "cpu") == torch.float32


def test_the_doctor_says_which_card_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpeft.cli.inspection import _device

    cards = {"cuda:0": (7, 5), "cuda:1": (8, 9)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "ab"[place])
    monkeypatch.setattr(torch.cuda, "get_device_capability", cards.__getitem__)
    assert _device() == "a (computes in fp16, has no bf16), b"


def test_a_device_that_cannot_quantize_is_named() -> None:
    from fedpeft.bases.quantize import check

    with pytest.raises(BaseError, match=r"'nf4' runs on .* not on mps"):
        check(BaseSpec("m", "nf4"), "mps")


TEXTS = ["open a file for writing", "sort a list of numbers", "send a mail over smtp"]


@pytest.fixture(scope="module")
def plain() -> Any:
    return load_base(BaseSpec("minilm"), "cpu").embed(TEXTS)


@pytest.mark.parametrize("quantization", [pytest.param(kind, marks=() if kind == "nf4" else pytest.mark.slow) for kind in KINDS])
def test_minilm_embeds_alike(quantization: str, plain: Any) -> None:
    small = load_base(BaseSpec("minilm", quantization), "cpu").embed(TEXTS)  # type: ignore[arg-type]
    assert ((plain * small).sum(1) > 0.9).all()
    assert ((plain @ small.T).argmax(1) == range(3)).all()
