"""The dense weights of base and adapter together, in a folder that any server of transformers' models reads.

A quantized base is read through its own layers, which gives its dequantized weights, and the adapter's change is added to those: what is
written is what is served here, up to rounding. It is never quantized again (CENTRAL.md 6: a merged 4-bit base moves logits by 0.4-0.7).
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpeft.adapters.affine import bare_of, changes, probes
from fedpeft.adapters.live import Live
from fedpeft.bases import Base
from fedpeft.bases.quiet import quiet_transformers
from fedpeft.bases.spec import rounding
from fedpeft.errors import AdapterError, StorageError
from fedpeft.exporting.checking import logits
from fedpeft.exporting.formats import Export, Written
from fedpeft.files import sync_folder


def write(export: Export, folder: Path) -> Written:
    """Merge and save.

    Raises:
        AdapterError: the adapter is no change of weights (prompts, bottlenecks, DoRA on a layer that is not affine).
        StorageError: the folder exists or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder}: exists already; name a new folder")
    base = export.loaded()
    shell = base.shell(export.adapter.spec.head)
    plain, names = probes(shell), list(shell.state_dict(keep_vars=True))
    with Live.attach(base, export.adapter.spec) as live:
        live.load(export.adapter.tensors)
        wanted = logits(live.model.eval(), base, live.spec.head)
        state = _state(live, plain, names)
    model = _dense(shell, state, export)
    off, scale = float((logits(model, base, export.adapter.spec.head) - wanted).abs().max()), float(wanted.abs().max())
    if not off <= rounding(base.spec.quantization) * max(scale, 1.0):
        raise AdapterError(
            f"adapter {export.adapter.spec.task}: {export.adapter.spec.method.kind} also acts where no weight is (logits "
            f"would be {off:.2e} off); serve it with fedpeft as it is"
        )
    _save(model, base, folder)
    return Written(folder, (f"logits are up to {off:.2e} off the adapter on the {_kind(base)} base (largest {scale:.3g})",))


def _kind(base: Base) -> str:
    return "dense" if base.spec.quantization == "none" else base.spec.quantization


@torch.no_grad()
def _state(live: Live, plain: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Every tensor of the merged model, float32: linear layers read through themselves, all else as it is now."""
    held = live.model.state_dict()
    bare = {name: held[name].float().clone() for name in names if name in held and held[name].is_floating_point()}
    for one in changes(live.model, plain, live.spec):
        own = bare_of(one.layer)
        turned = isinstance(own, Conv1D)
        dense = type(own.weight) is nn.Parameter and own.weight.is_floating_point()
        weight = own.weight.float() + (one.change if turned else one.change.t()) if dense else (one.before + one.change).t()
        bare[f"{one.name}.weight"] = weight.contiguous().clone()
        if getattr(own, "bias", None) is not None:
            bare[f"{one.name}.bias"] = _offset(one.layer, one.before)
    return bare


def _offset(layer: Any, before: Tensor) -> Tensor:
    """What the layer gives for zeros: the bias, and what the adapter makes of it."""
    own = bare_of(layer)
    zeros = torch.zeros(
        1, 1, len(before), device=before.device, dtype=next(own.parameters()).dtype if own.weight.is_floating_point() else None
    )
    found: Tensor = layer(zeros)[0, 0].float()
    return found.clone()


def _dense(shell: Any, state: dict[str, Tensor], export: Export) -> Any:
    """A fresh model of the shell's architecture with ``state`` in it, and a config that names the labels and no quantization."""
    config = copy.deepcopy(shell.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache, config.dtype = True, torch.float32
    head = export.adapter.spec.head
    if head.kind == "classification":
        config.id2label = dict(enumerate(head.labels))
        config.label2id = {label: place for place, label in enumerate(head.labels)}
    with quiet_transformers():
        model = type(shell)._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise AdapterError(f"export: {type(model).__name__} lacks {[*missing, *unexpected][:3]} after merging; export the adapter")
    model.tie_weights()
    return model.to(export.loaded().device).eval()


def _save(model: Any, base: Base, folder: Path) -> None:
    """The whole folder or nothing."""
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        with quiet_transformers():
            model.save_pretrained(partial)
            (base.tokenizer if base.processor is None else base.processor.inner).save_pretrained(partial)
        partial.chmod(0o755)
        for name in os.listdir(partial):
            with open(partial / name, "rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as fault:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"{folder}: cannot be written: {fault.strerror or fault}; free space or choose another place") from None
