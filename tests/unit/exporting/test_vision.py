"""Adapters of vision encoders in other forms: stock peft and transformers answer alike, and who cannot take them is named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification

from fedpeft.adapters import AdapterSpec, attach
from fedpeft.adapters.convert import to_lora
from fedpeft.bases import BaseSpec, load_base
from fedpeft.errors import AdapterError
from fedpeft.exporting import Export, exported, make_format


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["ViT", "ConvNext", pytest.param("Swin", marks=pytest.mark.slow)])
def test_stock_peft_and_merged_weights_answer_as_the_adapter_does(vision_folder, made, tmp_path, kind):
    base = load_base(BaseSpec(str(vision_folder(kind))), "cpu")
    adapter = made(base, r=4, targets=("all",), labels=True)
    export = Export(adapter, base)
    for form in ("peft", "merged"):
        _, found = exported(make_format(form), export, tmp_path / form, check=True)
        assert found.difference < 1e-5 * max(found.scale, 1)
    assert to_lora(base, adapter, 4).output_error < 1e-3
    with pytest.raises(AdapterError, match="has a classification head, which vLLM takes not"):
        exported(make_format("vllm"), export, tmp_path / "vllm", check=False)

    # as a stranger would, from the exported folder and the base's own
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["task_type"] is None
    fresh = AutoModelForImageClassification.from_pretrained(vision_folder(kind), num_labels=3, ignore_mismatched_sizes=True)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "peft").eval()
    images = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    values = AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")(list(images), return_tensors="pt")["pixel_values"]
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert list(merged.config.id2label.values()) == ["yes", "no", "maybe"]
    with attach(base, adapter.spec) as live, torch.no_grad():
        live.load(adapter.tensors)
        wanted = live.model.eval()(pixel_values=values).logits
        for model in (loaded, merged):
            torch.testing.assert_close(model(pixel_values=values).logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_spec_of_images_says_so_and_reads_back(vision_folder, made):
    spec = made(load_base(BaseSpec(str(vision_folder("ViT"))), "cpu"), r=2, labels=True).spec
    assert spec.images
    assert AdapterSpec.from_json(spec.to_json()) == spec
    assert "images" not in replace(spec, images=False).to_json()
