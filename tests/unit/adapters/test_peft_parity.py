"""What we export, stock peft loads on a freshly loaded model, with the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedpeft.adapters import Adapter, attach, make_spec, save
from fedpeft.bases import Base, BaseSpec, HeadSpec, load_base
from fedpeft.methods.protocol import Method

Warm = Callable[..., Base]
Shaken = Callable[..., Adapter]
LABELS = HeadSpec("classification", ("a", "b", "c"))
Placed = tuple[Method, str, HeadSpec]
Logits = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# peft 0.21 asks transformers 5.23 by a name that transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def parity(base: Base, folder: Path, adapter: Adapter, inputs: dict[str, Any], where: Path) -> Logits:
    """(our logits, peft's, the bare model's) on ``inputs``."""
    save(adapter, where)
    with attach(base, adapter.spec) as live, torch.no_grad():
        live.load(adapter.tensors)
        ours = live.model.eval()(**inputs).logits
    if adapter.spec.head.kind == "lm":
        fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        fresh = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(adapter.spec.head.labels), dtype=torch.float32)
        fresh.config.pad_token_id = base.tokenizer.pad_token_id
    with torch.no_grad():
        bare = fresh.eval()(**inputs).logits
        theirs = PeftModel.from_pretrained(fresh, where).eval()(**inputs).logits
    return ours, theirs, bare


def is_own(adapter: Adapter) -> bool:
    """Whether the method is one that peft does not have."""
    spec = adapter.spec
    return str(spec.method.peft_config("m", spec.head, spec.layout)["peft_type"]).startswith("FEDPEFT")


def test_same_logits_in_stock_peft(
    warm: Warm, folders: dict[str, Path], placed: Placed, shaken: Shaken, inputs: dict[str, Any], tmp_path: Path
) -> None:
    method, name, head = placed
    adapter = shaken(make_spec("t", warm(name), method, head))
    if is_own(adapter):
        with pytest.raises(KeyError, match="FEDPEFT"):
            parity(warm(name), folders[name], adapter, inputs, tmp_path / "a")
        return
    ours, theirs, bare = parity(warm(name), folders[name], adapter, inputs, tmp_path / "a")
    if head.kind == "lm":  # a prompt's own positions come first; padding answers anything
        real = inputs["attention_mask"].bool()
        ours, theirs, bare = (logits[:, -real.shape[1] :][real] for logits in (ours, theirs, bare))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - bare).abs().max() > 1e-3


@pytest.fixture(scope="module")
def minilm() -> Base:
    return load_base(BaseSpec("minilm"), "cpu")


@pytest.mark.parametrize(
    "method",
    ["dora", "ia3", "lora", "prefix", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("prompt", "rslora"))],
    indirect=True,
)
def test_minilm(minilm: Base, method: Method, shaken: Shaken, tmp_path: Path) -> None:
    from fedpeft.bases import resolve_model

    base, adapter = minilm, shaken(make_spec("t", minilm, method, LABELS))
    inputs = base.tokenizer(["open a file", "sort the items of a list by a key"], padding=True, return_tensors="pt")
    ours, theirs, _ = parity(base, resolve_model("minilm"), adapter, dict(inputs), tmp_path / "a")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
