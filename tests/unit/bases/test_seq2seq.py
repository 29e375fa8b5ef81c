"""Encoder-decoders as bases: one trunk under both heads, transformers' own answers, quantization, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from fedpeft.bases import Base, BaseSpec, HeadSpec, load_base, meta_base, module_roles, outline_base
from fedpeft.bases.loading import _family
from fedpeft.bases.quantize import is_quantized
from fedpeft.bases.spec import LAST
from fedpeft.errors import AdapterError, BaseError

Folder = Callable[[str], Path]
LABELS, LM = HeadSpec("classification", ("a", "b", "c")), HeadSpec("lm")
IDS = torch.tensor([[10, 11, 12, 13, 1], [20, 21, 1, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def load(folder: Path, quantization: str = "none") -> Base:
    return load_base(BaseSpec(str(folder), quantization, max_tokens=32), "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_both_heads_share_the_trunk_and_answer_as_transformers_does(seq2seq_folder: Folder, kind: str) -> None:
    base, meta = load(seq2seq_folder(kind)), meta_base(BaseSpec(str(seq2seq_folder(kind)), max_tokens=32))
    assert (base.family, base.width, base.fingerprint) == ("seq2seq", 32, meta.fingerprint)
    writer, classifier = base.shell(LM), base.shell(LABELS)
    assert getattr(classifier, classifier.base_model_prefix) is base.trunk
    assert writer.get_encoder() is base.trunk.get_encoder() is base.reader
    assert not any(p.requires_grad for p in (*writer.parameters(), *base.trunk.parameters()))
    for ours, form in ((writer, AutoModelForSeq2SeqLM), (classifier, AutoModelForSequenceClassification)):
        peer = form.from_pretrained(seq2seq_folder(kind), num_labels=3, dtype=torch.float32).eval()
        head = {name: value for name, value in ours.state_dict().items() if name.startswith("classification_head")}
        peer.load_state_dict(head, strict=False)
        inputs = INPUTS | ({"decoder_input_ids": IDS} if form is AutoModelForSeq2SeqLM else {})
        with torch.no_grad():
            assert torch.equal(ours(**inputs).logits, peer(**inputs).logits)
    for head in (LM, LABELS):
        shapes = [[(name, p.shape) for name, p in one.shell(head).named_parameters()] for one in (base, meta)]
        assert shapes[0] == shapes[1]
    assert module_roles(outline_base(base.spec).model) == module_roles(writer)
    assert module_roles(writer)["head"] == ["lm_head"]
    assert not module_roles(writer)["outside"]


def test_embeddings_are_the_encoders_mean_whatever_stands_beside(seq2seq_folder: Folder) -> None:
    base = load(seq2seq_folder("t5"))
    found = base.embed(["w1 w2 w3", "w4"])
    with torch.no_grad():
        hidden = base.trunk.get_encoder()(input_ids=torch.tensor([[5, 6, 7, 1]])).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(found[0], hidden / hidden.norm(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(base.embed(["w4"])[0], found[1], rtol=1e-5, atol=1e-6)


def test_modules_are_watched_under_either_heads_names_the_decoders_at_its_first_token(seq2seq_folder: Folder) -> None:
    base = load(seq2seq_folder("t5"))
    names = [
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.k",
    ]
    found = base.watch("w1 w2 w3", [*names, f"transformer.{names[0]}", LAST])
    assert [len(found[name]) for name in [*names, LAST]] == [4, 1, 4, 4]
    assert np.array_equal(found[names[0]], found[f"transformer.{names[0]}"])
    mean = found[LAST].mean(0)
    np.testing.assert_allclose(mean / np.linalg.norm(mean), base.embed(["w1 w2 w3"])[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(AdapterError, match="has no modules"):
        base.watch("w1", ["decoder.block.9"])


@pytest.mark.parametrize(("kind", "quantization"), [("t5", "nf4"), ("t5", "ao-int8"), ("bart", "int8")])
def test_the_blocks_are_quantized_but_for_what_t5_keeps_wide(seq2seq_folder: Folder, kind: str, quantization: str) -> None:
    base = load(seq2seq_folder(kind), quantization)
    roles = module_roles(base.model)
    kept = {name for name in roles["mlp"] if name.endswith(".wo")} if quantization != "ao-int8" else set()
    small = {name for name, module in base.model.named_modules() if is_quantized(module)}
    assert small == set(roles["attention"] + roles["mlp"]) - kept
    plain = load(seq2seq_folder(kind)).model
    with torch.no_grad():
        for name in small:  # the weights that are meant, read off the layers
            layer, dense = base.model.get_submodule(name), plain.get_submodule(name)
            dense.weight.copy_((layer(torch.eye(layer.in_features)) - (0 if layer.bias is None else layer.bias)).T)
        wanted, found = (model(**INPUTS, decoder_input_ids=IDS).logits for model in (plain, base.shell(LM)))
    assert float((found - wanted).norm() / wanted.norm()) < (0.1 if quantization == "int8" else 1e-4)
    assert base.shell(LABELS)(**INPUTS).logits.dtype == torch.float32


def spoilt(folder: Path, to: Path, **settings: object) -> Path:
    copy = Path(shutil.copytree(folder, to))
    table = json.loads((copy / "config.json").read_text()) | settings
    (copy / "config.json").write_text(json.dumps(table))
    return copy


def test_what_is_no_encoder_decoder_of_text_or_cannot_tell_its_end_is_refused(seq2seq_folder: Folder, tmp_path: Path) -> None:
    whisper = spoilt(seq2seq_folder("bart"), tmp_path / "whisper", model_type="whisper")
    with pytest.raises(BaseError, match="WhisperConfig is an encoder-decoder that writes no text; use one of text"):
        load(whisper)
    table = {"model_type": "t5gemma", "encoder": {}, "decoder": {}}
    with pytest.raises(BaseError, match="T5GemmaConfig has a config of its own for each half"):
        load(spoilt(seq2seq_folder("t5"), tmp_path / "gemma", **table))
    with pytest.raises(BaseError, match="ProphetNetConfig's answers change with how far rows are filled"):
        load(spoilt(seq2seq_folder("t5"), tmp_path / "prophet", model_type="prophetnet"))
    endless = load(spoilt(seq2seq_folder("t5"), tmp_path / "endless", eos_token_id=0))
    with pytest.raises(BaseError, match="its classifier reads where the end token stands, and eos_token_id is 0"):
        endless.shell(LABELS)


HALVES = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}
HALVES |= {f"num_{name}": n for name, n in HALVES.items() if not name.endswith("dim")}
SMALL = HALVES | {
    **{name: 64 for name in ("vocab_size", "src_vocab_size", "tgt_vocab_size", "t2u_vocab_size", "unit_hifi_gan_vocab_size", "d_ff")},
    **{"d_model": 32, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "num_experts": 4, "speech_encoder_layers": 1},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_window": [8, 8], "router_jitter_noise": 0.0},
}


def small(kind: str) -> object | None:
    """The config of ``kind``, shrunk; None where its bases are refused."""
    default = CONFIG_MAPPING[kind]()
    fitting = {name: value for name, value in SMALL.items() if hasattr(default, name)}
    config = CONFIG_MAPPING[kind](**{name: value for name, value in fitting.items() if kind != "fsmt" or name != "vocab_size"})
    try:
        return config if _family(config, BaseSpec(kind)) == "seq2seq" else None
    except BaseError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES))
def test_what_is_taken_answers_each_row_the_same_however_it_is_filled(kind: str) -> None:
    """The law that `UNSTEADY` architectures break, of every one that transformers knows and we take."""
    config = small(kind)
    if config is None:
        pytest.skip("refused")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
        for values in (parameter for parameter in model.parameters() if parameter.dim() > 1):
            values.normal_(0, 0.3)
        asked, said = ([torch.randint(5, 60, (count,)) for count in counts] for counts in ((9, 4, 6), (3, 7, 5)))
        ids = pad_sequence(asked, True)
        filled = model(input_ids=ids, attention_mask=(ids != 0).long(), decoder_input_ids=pad_sequence(said, True), use_cache=False).logits
        for row, (one, two) in enumerate(zip(asked, said, strict=True)):
            alone = model(input_ids=one[None], decoder_input_ids=two[None], use_cache=False).logits[0]
            torch.testing.assert_close(filled[row, : len(two)], alone, rtol=1e-4, atol=1e-4)
