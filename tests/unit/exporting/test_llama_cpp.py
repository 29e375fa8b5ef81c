"""llama.cpp itself serves the GGUF that is exported. Runs where FEDPEFT_TEST_LLAMA_CPP names its sources and xllamacpp is installed.

The sources come with `pip download --no-deps llama-cpp-python` (folder vendor/llama.cpp); `pip install xllamacpp sentencepiece` runs them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeft.adapters import attach
from fedpeft.exporting import Export, exported, make_format

SOURCES = os.environ.get("FEDPEFT_TEST_LLAMA_CPP", "")
pytestmark = [
    pytest.mark.skipif(not SOURCES, reason="set FEDPEFT_TEST_LLAMA_CPP to the folder of llama.cpp's sources"),
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


def answered(base: Path, prompt: list[int], words: int, lora: Path | None) -> np.ndarray:
    """Log-probabilities (V,) of the token after ``prompt``, by llama.cpp in float32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = str(base), 128, False
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)] if lora else []
    found = xllamacpp.Server(params).handle_completions({"prompt": prompt, "n_predict": 1, "temperature": 0.0, "n_probs": words})
    table = (json.loads(found) if isinstance(found, str) else found)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    logs = np.full(words, np.nan)
    logs[[one["id"] for one in table]] = [one["logprob"] for one in table]
    return logs


def test_llama_cpp_answers_as_the_adapter_does(bases, made, tmp_path):
    base = bases("stories260k")
    adapter, whole = made(base, r=4, targets=("all",)), tmp_path / "base.gguf"
    folder = base.spec.model
    convert = [sys.executable, f"{SOURCES}/convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", str(whole)]
    subprocess.run(convert, check=True, capture_output=True)
    form = make_format({"kind": "gguf", "converter": f"{SOURCES}/convert_lora_to_gguf.py"})
    written, _ = exported(form, Export(adapter), tmp_path / "out", check=True)
    prompt = base.tokenizer("Once upon a time, there was a little girl named Lily.")["input_ids"]
    with torch.no_grad(), attach(base, adapter.spec) as live:
        plain = answered(whole, prompt, base.config.vocab_size, None)
        live.load(adapter.tensors)
        wanted = live.model.eval()(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).numpy()
    given = answered(whole, prompt, base.config.vocab_size, written.folder / "adapter.gguf")
    assert np.abs(given - wanted).max() < 0.05, "its cache of keys and values is in half precision"
    assert np.abs(plain - wanted).max() > 1.0, "the adapter must matter"
