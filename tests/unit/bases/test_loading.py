from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fedpeft.bases as bases
from fedpeft.bases import BaseSpec, HeadSpec, load_base, meta_base
from fedpeft.errors import BaseError

Tiny = Callable[[str], Path]
LABELS = HeadSpec("classification", ("a", "b", "c"))
ENCODERS = ["bert", "roberta", "distilbert", "modernbert"]
CAUSAL = ["llama", "gpt2"]


def spec(folder: Path, **settings: object) -> BaseSpec:
    return BaseSpec(str(folder), **{"max_tokens": 32, **settings})  # type: ignore[arg-type]


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[3, 10, 11, 12, 13], [3, 20, 21, 1, 1]])
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


@pytest.mark.parametrize("kind", ENCODERS + CAUSAL)
def test_family_frozen_and_in_eval_mode(tiny_model: Tiny, kind: str) -> None:
    base = load_base(spec(tiny_model(kind)), "cpu")
    assert base.family == ("causal" if kind in CAUSAL else "encoder")
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert all(p.dtype == torch.float32 for p in base.model.parameters())


def test_loads_are_counted(tiny_model: Tiny) -> None:
    before = bases.LOADS
    load_base(spec(tiny_model("bert")), "cpu")
    meta_base(spec(tiny_model("bert")))
    assert before + 1 == bases.LOADS


@pytest.mark.parametrize("kind", ENCODERS + CAUSAL)
def test_shells_share_the_trunk_and_answer_as_transformers_does(tiny_model: Tiny, kind: str) -> None:
    base = load_base(spec(tiny_model(kind)), "cpu")
    one, two = base.shell(LABELS), base.shell(HeadSpec("classification", ("x", "y")))
    trunk = one.base_model_prefix
    assert getattr(one, trunk) is getattr(two, trunk) is base.trunk
    peer = AutoModelForSequenceClassification.from_pretrained(tiny_model(kind), num_labels=3, dtype=torch.float32)
    peer.config.pad_token_id = 1
    peer.load_state_dict({name: value for name, value in one.state_dict().items() if not name.startswith(f"{trunk}.")}, strict=False)
    with torch.no_grad():
        assert torch.equal(one(**inputs()).logits, peer.eval()(**inputs()).logits)
        assert two(**inputs()).logits.shape == (2, 2)


def test_heads_are_the_same_each_time_and_leave_the_random_state_alone(tiny_model: Tiny) -> None:
    base = load_base(spec(tiny_model("roberta")), "cpu")
    state = torch.random.get_rng_state()
    first, second = base.shell(LABELS), base.shell(LABELS)
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, left), (_, right) in zip(first.classifier.named_parameters(), second.classifier.named_parameters(), strict=True):
        assert torch.equal(left, right), name
        assert left.data_ptr() != right.data_ptr()
    assert first.classifier.out_proj.weight.std() > 0


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_lm_shell_is_the_causal_model(tiny_model: Tiny, kind: str) -> None:
    base = load_base(spec(tiny_model(kind)), "cpu")
    model = base.shell(HeadSpec("lm"))
    peer = AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, peer(**inputs()).logits)
    assert model(**inputs()).get("past_key_values") is None
    assert model.generate(**inputs(), max_new_tokens=3, do_sample=False).shape[1] == 8


def test_an_encoder_generates_nothing(tiny_model: Tiny) -> None:
    with pytest.raises(BaseError, match="generates no text"):
        load_base(spec(tiny_model("bert")), "cpu").shell(HeadSpec("lm"))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_meta_has_the_same_shapes_and_no_weights(tiny_model: Tiny, kind: str) -> None:
    meta, real = meta_base(spec(tiny_model(kind))), load_base(spec(tiny_model(kind)), "cpu")
    assert meta.fingerprint == real.fingerprint
    shapes = [[(name, p.shape) for name, p in base.shell(LABELS).named_parameters()] for base in (meta, real)]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in meta.shell(LABELS).parameters())
    with pytest.raises(BaseError, match="without weights"):
        meta.embed(["w1"])


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_only_when_asked_and_heads_stay_fp32(tiny_model: Tiny, kind: str, dtype: torch.dtype) -> None:
    base = load_base(spec(tiny_model("bert"), quantization=kind), "cpu")
    assert {p.dtype for p in base.trunk.parameters()} == {dtype}
    model = base.shell(LABELS)
    assert model.classifier.weight.dtype == torch.float32
    assert model(**inputs()).logits.dtype == torch.float32


def test_pad_token_falls_back_to_the_end_token(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "m"))
    path = folder / "tokenizer_config.json"
    table = json.loads(path.read_text())
    table.pop("pad_token")
    path.write_text(json.dumps(table))
    base = load_base(spec(folder), "cpu")
    assert base.tokenizer.pad_token == "</s>"
    assert base.shell(LABELS).config.pad_token_id == base.tokenizer.pad_token_id == 2


def spoil_pooler(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, folder / "model.safetensors", {"format": "pt"})


def spoil_shape(folder: Path) -> None:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, "intermediate_size": 96}))


def spoil_type(folder: Path, **changes: object) -> None:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, **changes}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_pooler, "missing .*pooler"),
        (spoil_shape, "do not fit|cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:1000]), "cannot be loaded"),
        (lambda f: spoil_type(f, model_type="no-such-architecture"), "unsupported architecture"),
        (lambda f: spoil_type(f, num_attention_heads=5), "cannot be built"),
        (lambda f: spoil_type(f, quantization_config={"quant_method": "gptq", "bits": 4}), "already quantized"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer cannot be loaded"),
    ],
)
def test_a_wrong_base_is_one_clear_line(tiny_model: Tiny, tmp_path: Path, spoil: Callable[[Path], object], says: str) -> None:
    folder = Path(shutil.copytree(tiny_model("bert"), tmp_path / "m"))
    spoil(folder)
    with pytest.raises(BaseError, match=says) as caught:
        load_base(spec(folder), "cpu")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "says"), [("t5", "names no decoder_start_token_id"), ("vit", "has no preprocessor_config"), ("bert-mlm", "pooler")]
)
def test_unsupported_architectures_are_refused(tiny_model: Tiny, kind: str, says: str) -> None:
    with pytest.raises(BaseError, match=says):
        load_base(spec(tiny_model(kind)), "cpu")


def test_texts_longer_than_the_model_are_refused(tiny_model: Tiny) -> None:
    with pytest.raises(BaseError, match=r"set base\.max_tokens = 64"):
        load_base(spec(tiny_model("bert"), max_tokens=65), "cpu")


def test_a_device_that_is_not_here_is_refused(tiny_model: Tiny) -> None:
    with pytest.raises(BaseError, match="device 'tpu' is not here"):
        load_base(spec(tiny_model("bert")), "tpu")


def test_remote_code_is_never_run(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("bert"), tmp_path / "m"))
    spoil_type(folder, model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BaseError, match="unsupported architecture"):
        load_base(spec(folder), "cpu")
    assert not (tmp_path / "ran").exists()


def test_real_models_load(shared_models: Path) -> None:
    for name in ("stories260k", "tinystories-656k", "babyllama105"):
        base = load_base(BaseSpec(str(shared_models / name)), "cpu")
        assert base.family == "causal"
        assert base.shell(LABELS)(**base.tokenizer(["once", "upon a time"], padding=True, return_tensors="pt")).logits.shape == (2, 3)
