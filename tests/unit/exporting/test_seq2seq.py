"""Adapters of encoder-decoders in other forms: peft and transformers answer alike, and who cannot take them is named."""

from __future__ import annotations

import json

import pytest

from fedpeft.adapters.convert import to_lora
from fedpeft.bases import BaseSpec, load_base
from fedpeft.errors import AdapterError
from fedpeft.exporting import Export, exported, make_format
from fedpeft.tasks import Generation

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TYPES = {None: "SEQ_2_SEQ_LM", True: "SEQ_CLS"}


@pytest.fixture(scope="module", params=["t5", pytest.param("bart", marks=pytest.mark.slow)])
def base(request, seq2seq_folder):
    return load_base(BaseSpec(str(seq2seq_folder(request.param)), max_tokens=32), "cpu")


@pytest.mark.parametrize("labels", TYPES)
def test_stock_peft_and_merged_weights_answer_as_the_adapter_does(base, made, tmp_path, labels):
    export = Export(made(base, r=4, targets=("all",), labels=labels), base)
    for form in ("peft", "merged"):
        _, found = exported(make_format(form), export, tmp_path / form, check=True)
        assert found.difference < 1e-4 * max(found.scale, 1)
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["task_type"] == TYPES[labels]
    assert to_lora(base, export.adapter, 4).output_error < 1e-3
    if labels is None:
        merged = load_base(BaseSpec(str(tmp_path / "merged"), max_tokens=32), "cpu")
        assert Generation("g", max_new_tokens=4).answer(merged.model, merged, "w1 w2") is not None
        with pytest.raises(AdapterError, match="is of an encoder-decoder, which vLLM takes not"):
            exported(make_format("vllm"), export, tmp_path / "vllm", check=False)
