"""What was written, loaded by peft and transformers alone, beside the adapter as it is served here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from fedpeft.adapters.live import Live
from fedpeft.bases import Base, HeadSpec, resolve_model
from fedpeft.bases.quiet import quiet_transformers
from fedpeft.bases.spec import rounding
from fedpeft.bases.trial import trial
from fedpeft.errors import AdapterError
from fedpeft.exporting.formats import Checked, Export


def served(export: Export) -> Tensor:
    """Logits of the adapter as it is served, on the rows of `trial`."""
    base, spec = export.loaded(), export.adapter.spec
    with Live.attach(base, spec) as live:
        live.load(export.adapter.tensors)
        return logits(live.model.eval(), base, spec.head)


@torch.no_grad()
def logits(model: Any, base: Base, head: HeadSpec) -> Tensor:
    """Float32 logits of the rows of `trial`."""
    found: Tensor = model(**trial(base, head)).logits
    return found.float().cpu()


def peft_check(export: Export, folder: Path) -> Checked:
    """Logits of `peft.PeftModel` on a freshly loaded dense base. Raises `AdapterError` when peft cannot load the folder."""
    from peft import PeftModel

    base, spec = export.loaded(), export.adapter.spec
    if base.spec.quantization != "none":
        raise AdapterError(
            f"export: --check of a PEFT folder compares on the dense base; leave --quantization {base.spec.quantization} out"
        )
    fresh = _fresh(resolve_model(base.spec.model, base.spec.revision), spec.head, base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(fresh, folder).eval()
    except (KeyError, ValueError, RuntimeError, TypeError) as fault:
        raise AdapterError(f"{folder}: peft cannot load it ({str(fault).splitlines()[0][:120]}); export it merged, or convert it") from None
    return compared(export, loaded, "logits of peft")


def merged_check(export: Export, folder: Path) -> Checked:
    """Logits of the merged model as transformers loads it."""
    base = export.loaded()
    return compared(export, _fresh(folder, export.adapter.spec.head, base), "logits of the merged model")


def compared(export: Export, model: nn.Module, what: str) -> Checked:
    """How far ``model`` is from the adapter as it is served."""
    base = export.loaded()
    ours, theirs = served(export), logits(model.to(base.device), base, export.adapter.spec.head)
    return Checked(what, float((ours - theirs).abs().max()), float(ours.abs().max()), rounding(base.spec.quantization))


def _fresh(folder: Path, head: HeadSpec, base: Base) -> Any:
    writer = AutoModelForSeq2SeqLM if base.family == "seq2seq" else AutoModelForCausalLM
    seen = base.processor is not None
    kind = writer if head.kind == "lm" else AutoModelForImageClassification if seen else AutoModelForSequenceClassification
    extra: dict[str, Any] = {} if head.kind == "lm" else {"num_labels": len(head.labels)}
    extra |= {"ignore_mismatched_sizes": True} if seen else {}  # such checkpoints have a classifier of other labels
    with quiet_transformers():
        model = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True, **extra
        )
    if base.tokenizer is not None:
        model.config.get_text_config().pad_token_id = base.tokenizer.pad_token_id
    return model.to(base.device).eval()
