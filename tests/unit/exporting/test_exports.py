"""What is written says what is served: reloaded by peft and transformers alone; and what a form cannot say is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedpeft.adapters import load
from fedpeft.errors import AdapterError, ConfigError, StorageError
from fedpeft.exporting import Export, exported, make_format
from fedpeft.exporting.vllm import RANKS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MERGES = {
    "lora": {"r": 4, "targets": ("all",)},
    "ia3": {},
    "dora": {"r": 2, "dora": True},
    "rslora": {"r": 4, "rslora": True, "extra": 2},
    "core": {"r": 4},
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "stories260k") for kind in MERGES), ("lora", "encoder"), pytest.param("lora", "minilm", marks=pytest.mark.slow)],
)
def test_merged_weights_answer_as_the_adapter_does(bases, made, tmp_path, name, kind):
    base = bases(name)
    adapter = made(base, "lora" if kind in ("dora", "rslora") else kind, **MERGES[kind])
    written, found = exported(make_format("merged"), Export(adapter, base), tmp_path / "out", check=True)
    assert found is not None
    assert found.difference < 1e-4 * max(found.scale, 1)
    assert "off the adapter on the dense base" in written.notes[0]
    assert base.holder is None


def test_biases_are_merged_where_a_base_has_them(bases, made, tmp_path):
    base = bases("encoder")
    _, found = exported(make_format("merged"), Export(made(base, "bitfit"), base), tmp_path / "out", check=True)
    assert found.difference < 1e-4 * max(found.scale, 1)


def test_the_merged_head_names_its_labels(bases, made, tmp_path):
    base = bases("encoder")
    exported(make_format("merged"), Export(made(base, r=2), base), tmp_path / "out", check=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["id2label"] == {"0": "yes", "1": "no", "2": "maybe"}
    assert (tmp_path / "out/tokenizer.json").is_file()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_is_dequantized_and_never_quantized_again(bases, made, tmp_path, quantization):
    base = bases("stories260k", quantization)
    adapter = made(base, r=4, targets=("all",))
    _, found = exported(make_format("merged"), Export(adapter, base), tmp_path / "out", check=True)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert all(values.dtype == torch.float32 for values in load_file(tmp_path / "out/model.safetensors").values())
    dense = bases("stories260k")
    exported(make_format("merged"), Export(made(dense, r=4, targets=("all",)), dense), tmp_path / "dense", check=False)
    off = load_file(tmp_path / "dense/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    mine = load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert (off - mine).abs().max() > 1e-3, "the quantized base's own rounding must be in what was merged"
    assert found.difference < (1e-4 if quantization == "nf4" else 0.1) * max(found.scale, 1)


@pytest.mark.parametrize(("kind", "settings"), [("prompt", {"tokens": 3}), ("bottleneck", {"dim": 8})])
def test_what_is_no_change_of_weights_is_not_merged(bases, made, tmp_path, kind, settings):
    base = bases("stories260k")
    with pytest.raises(AdapterError, match="serve it with fedpeft"):
        exported(make_format("merged"), Export(made(base, kind, **settings), base), tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()
    assert base.holder is None


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_lora_folders_load_in_stock_peft_with_the_same_logits(bases, made, tmp_path, form):
    base = bases("stories260k")
    adapter = made(base, r=4, targets=("all",))
    _, found = exported(make_format(form), Export(adapter, base), tmp_path / "out", check=True)
    assert found.difference < 1e-4 * max(found.scale, 1)
    assert load(tmp_path / "out").digest == adapter.digest


def test_a_folder_that_was_changed_fails_its_check(bases, made, tmp_path):
    base = bases("stories260k")
    adapter = made(base, r=4)
    form = make_format("peft")
    exported(form, Export(adapter, base), tmp_path / "out", check=True)

    @dataclasses.dataclass(frozen=True)
    class Spoilt:
        kind = "peft"
        needs_base = False

        def write(self, export, folder):
            done = form.write(export, folder)
            tensors = load_file(folder / "adapter_model.safetensors")
            name = next(name for name in tensors if "lora_B" in name)
            save_file({**tensors, name: tensors[name] + 1.0}, folder / "adapter_model.safetensors")
            return done

        check = staticmethod(form.check)

    with pytest.raises(AdapterError, match=r"off .* do not serve it"):
        exported(Spoilt(), Export(adapter, base), tmp_path / "spoilt", check=True)


def test_vllm_is_given_what_its_loader_takes(bases, made, tmp_path):
    base = bases("stories260k")
    written, _ = exported(make_format("vllm"), Export(made(base, r=9, targets=("all",))), tmp_path / "a", check=False)
    assert "--max-lora-rank 16" in written.notes[0]
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 9
    assert not config["modules_to_save"]
    assert config["bias"] == "none"
    names = set(load_file(tmp_path / "a/adapter_model.safetensors"))
    assert all(name.startswith("base_model.model.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


REFUSED = [
    ({"r": 9}, {"max_rank": 8}, AdapterError, "rank 9 is above the server's 8"),
    ({"r": 9}, {"max_rank": 10}, ConfigError, "none of vLLM's"),
    ({"r": 2, "dora": True}, {}, AdapterError, "no DoRA"),
    ({"r": 2, "extra": 2}, {}, AdapterError, "second product"),
    ({"kind": "ia3"}, {}, AdapterError, "LoRA alone, this is ia3"),
    ({"labels": True, "r": 2}, {}, AdapterError, "classification head"),
]


@pytest.mark.parametrize(("made_of", "settings", "fault", "words"), REFUSED, ids=[words[-14:] for *_, words in REFUSED])
def test_vllm_is_not_given_what_it_would_refuse_or_drop(bases, made, tmp_path, made_of, settings, fault, words):
    adapter = made(bases("stories260k"), **made_of)
    with pytest.raises(fault, match=words):
        exported(make_format({"kind": "vllm", **settings}), Export(adapter), tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_vllm_is_not_given_layers_that_it_does_not_adapt(bases, made, tmp_path):
    adapter = made(bases("encoder"), r=2, targets=("attention",), labels=None)
    bare = dataclasses.replace(adapter.spec, head=dataclasses.replace(adapter.spec.head, kind="lm", labels=()))
    with pytest.raises(AdapterError, match=r"targets.*key.*which vLLM does not adapt"):
        exported(make_format("vllm"), Export(dataclasses.replace(adapter, spec=bare)), tmp_path / "out", check=False)


def test_the_rank_list_is_vllms():
    assert RANKS == (1, 8, 16, 32, 64, 128, 256, 320, 512)


def test_an_export_never_writes_over_anything(bases, made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    for form in ("peft", "merged", "vllm"):
        with pytest.raises(StorageError, match="exists already"):
            exported(make_format(form), Export(made(bases("stories260k"), r=2), bases("stories260k")), tmp_path / "out", check=False)
    assert os.listdir(tmp_path / "out") == ["precious"]


CONVERTER = """#!/usr/bin/env python3
import json, pathlib, struct, sys
from safetensors import safe_open
at = sys.argv.index
out, source = pathlib.Path(sys.argv[at("--outfile") + 1]), pathlib.Path(sys.argv[-1])
assert (pathlib.Path(sys.argv[at("--base") + 1]) / "config.json").is_file() and sys.argv[at("--outtype") + 1] == "f32"
if json.loads((source / "adapter_config.json").read_text())["r"] == 3:
    sys.exit("ERROR: no rank of three")
with safe_open(source / "adapter_model.safetensors", "np") as file:
    out.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, len(list(file.keys())) - {drop}, 0))
"""


@pytest.fixture
def converter(tmp_path):
    """A program with the command line of llama.cpp's converter; it writes a file's header alone (`test_llama_cpp` runs the real one)."""

    def make(drop: int = 0) -> str:
        path = tmp_path / f"convert_{drop}.py"
        path.write_text(CONVERTER.replace("{drop}", str(drop)))
        return str(path)

    return make


def test_gguf_runs_the_converter_and_reads_what_it_wrote(bases, made, tmp_path, converter):
    adapter = made(bases("stories260k"), r=4)
    _, found = exported(make_format({"kind": "gguf", "converter": converter()}), Export(adapter), tmp_path / "out", check=True)
    assert found.difference is None
    assert os.listdir(tmp_path / "out") == ["adapter.gguf"]
    assert struct.unpack("<4sIQ", (tmp_path / "out/adapter.gguf").read_bytes()[:16])[2] == len(adapter.spec.layout.entries)
    with pytest.raises(AdapterError, match="the converter left some out"):
        exported(make_format({"kind": "gguf", "converter": converter(1)}), Export(adapter), tmp_path / "lost", check=True)


def test_gguf_says_what_is_missing_or_failed(bases, made, tmp_path, converter):
    with pytest.raises(ConfigError, match=r"neither a file nor on PATH.*llama.cpp"):
        exported(make_format("gguf"), Export(made(bases("stories260k"), r=4)), tmp_path / "a", check=False)
    with pytest.raises(AdapterError, match="code 1: ERROR: no rank of three"):
        exported(
            make_format({"kind": "gguf", "converter": converter()}), Export(made(bases("stories260k"), r=3)), tmp_path / "b", check=False
        )
    with pytest.raises(AdapterError, match="plain LoRA"):
        exported(
            make_format({"kind": "gguf", "converter": converter()}), Export(made(bases("stories260k"), "ia3")), tmp_path / "c", check=False
        )


def test_an_unknown_format_is_named():
    with pytest.raises(ConfigError, match=r"onnx.*gguf.*merged.*peft.*vllm"):
        make_format("onnx")


def test_the_command_writes_checks_and_says_so(bases, made, tmp_path, capsys):
    from fedpeft.cli.main import run
    from fedpeft.registry import Manifest, Registry

    Registry(tmp_path / "registry").publish(made(bases("stories260k"), r=4), Manifest(), origin="x")
    for form, file in [("peft", "manifest.sig"), ("merged", "model.safetensors"), ("vllm", "adapter_config.json")]:
        words = ["adapters", "export", "t", str(tmp_path / form), "--format", form, "--check", "--registry", str(tmp_path / "registry")]
        assert run(words) == 0
        assert "off what is served" in capsys.readouterr().out
        assert (tmp_path / form / file).is_file()
    assert run([*words[:3], str(tmp_path / "x"), "--set", "max_rank=8", *words[-2:]]) == ConfigError.exit_code
    assert "unknown keys ['max_rank']" in capsys.readouterr().err


def test_a_path_needs_no_quotes_on_the_command_line(bases, made, tmp_path, converter, capsys):
    from fedpeft.adapters import save
    from fedpeft.cli.main import run

    save(made(bases("stories260k"), r=4), tmp_path / "adapter")
    words = ["adapters", "export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--format", "gguf", "--check"]
    assert run([*words, "--set", f"converter={converter()}"]) == 0
    assert "tensors are in the file" in capsys.readouterr().out
    assert run([*words, "--set", "converter"]) == ConfigError.exit_code
    assert "--set converter: needs the form key=value" in capsys.readouterr().err
