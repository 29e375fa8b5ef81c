"""Load a base once: config, tokenizer or image processor, weights (safetensors only, never remote code), frozen, in eval mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from fedpeft.bases.base import Base
from fedpeft.bases.faults import FAULTS, one_line
from fedpeft.bases.fingerprint import fingerprint
from fedpeft.bases.quantize import check_quantized, compute_dtype, keep_layout, settings
from fedpeft.bases.quiet import quiet_transformers
from fedpeft.bases.resolve import resolve_model
from fedpeft.bases.roles import head_modules
from fedpeft.bases.spec import CLASSIFIERS, HALF, BaseSpec, Family, Fingerprint
from fedpeft.bases.vision import read_processor, require_blocks, sees
from fedpeft.errors import BaseError

LOADERS: dict[Family, Any] = {
    "encoder": AutoModelForSequenceClassification,
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "vision": AutoModelForImageClassification,
}
UNSTEADY = ("prophetnet",)
"""Encoder-decoders whose answer at every position changes with how far their row is filled, so that no batch has the loss of its rows."""


def load(spec: BaseSpec, device: str = "auto", zero: Mapping[str, Any] | None = None) -> Base:
    """Weights of ``spec`` on ``device``, whole or in the parts that ``zero`` asks for. Raises `BaseError` when that cannot be."""
    place = pick_device(spec, device)
    base = blueprint(spec)
    extra = settings(spec, place, base.model)
    folder = resolve_model(spec.model, spec.revision)
    try:
        with quiet_transformers(), nullcontext() if zero is None else _in_parts(spec, zero):
            model, report = LOADERS[base.family].from_pretrained(
                folder,
                config=base.config,
                dtype=compute_dtype(spec, place),
                device_map={"": place} if zero is None else None,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **extra,
            )
    except FAULTS as fault:
        raise BaseError(
            f"base {spec.model}: cannot be loaded from {folder} on {place}: {one_line(fault)}; is the download whole?"
        ) from None
    _check_complete(base, model, report)
    check_quantized(spec, model)
    keep_layout(model)
    base.model, base.trunk, base.device = model.requires_grad_(False).eval(), _trunk(spec, model), place
    if base.processor is not None:
        base.processor.feed(base.trunk)
    return base


def blueprint(spec: BaseSpec, known: Fingerprint | None = None) -> Base:
    """The architecture of ``spec`` without weights, on the meta device. Raises `BaseError` as `load`."""
    base = outline(spec)
    base.fingerprint = known or fingerprint(spec)
    if base.family == "vision":
        base.processor = read_processor(base, resolve_model(spec.model, spec.revision))
        return base
    base.tokenizer = _tokenizer(resolve_model(spec.model, spec.revision), base.config, spec)
    _check_length(base.tokenizer, base.config, spec)
    if base.family == "seq2seq":
        base.before([int(base.tokenizer.pad_token_id == 0)])  # any token that is not padding
    return base


def outline(spec: BaseSpec) -> Base:
    """The architecture of ``spec`` from its ``config.json`` alone, on the meta device. Raises `BaseError` as `load`."""
    config = _config(resolve_model(spec.model, spec.revision), spec)
    family = _family(config, spec)
    try:
        with quiet_transformers(), torch.device("meta"):
            model = LOADERS[family].from_config(config, dtype=torch.float32, trust_remote_code=False)
    except FAULTS as fault:
        raise BaseError(
            f"base {spec.model}: {type(config).__name__} cannot be built: {one_line(fault)}; use another architecture"
        ) from None
    if family == "vision":
        require_blocks(spec, model)
    model.requires_grad_(False).eval()
    return Base(spec, Fingerprint("", "", "", spec.quantization), family, None, config, "meta", model, _trunk(spec, model))


@contextmanager
def _in_parts(spec: BaseSpec, zero: Mapping[str, Any]) -> Iterator[None]:
    """Within, transformers hands each weight to ZeRO-3 as it is read (``zero.Init``), which leaves this rank its part.

    That makes weights of float32 of all of them unless it is told of half precision, whatever the model was asked for in.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    half: dict[str, Any] = {kind: {"enabled": spec.quantization == kind} for kind in HALF}
    table = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": dict(zero), **half}
    held = HfDeepSpeedConfig(table)
    try:
        yield
    finally:
        del held
        unset_hf_deepspeed_config()


def pick_device(spec: BaseSpec, device: str) -> str:
    """The device that ``device`` names, ``auto`` being CUDA where there is one. Raises `BaseError` when it is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(kind, False):
        raise BaseError(
            f"base {spec.model}: device {device!r} is not here; use one of {['auto', *(name for name, there in here.items() if there)]}"
        )
    return device


def _config(folder: Path, spec: BaseSpec) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except FAULTS as fault:
        raise BaseError(f"base {spec.model}: unsupported architecture: {one_line(fault)}; use one that transformers knows") from None
    if getattr(config, "quantization_config", None) is not None:
        raise BaseError(f"base {spec.model}: its weights are already quantized; name the unquantized model and set base.quantization")
    # A cache of keys and values is of use in generation alone, and generate() asks for it itself.
    config.use_cache = False
    return config


def _family(config: Any, spec: BaseSpec) -> Family:
    """Encoder before causal: BERT's kind is in the causal mapping too, for its use as a decoder."""
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        return _seq2seq(config, spec)
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not masked:
        return "causal"
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return "encoder"
    if sees(config):
        return "vision"
    raise BaseError(
        f"base {spec.model}: {name} has neither a causal nor a classification form; use a text or vision encoder, or a causal model"
    )


def _seq2seq(config: Any, spec: BaseSpec) -> Family:
    """An encoder-decoder over text, both halves under one config. Raises `BaseError` for any other."""
    name = type(config).__name__
    if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise BaseError(f"base {spec.model}: {name} is an encoder-decoder that writes no text; use one of text, such as T5 or BART")
    if any(hasattr(config, own) for own in ("encoder", "decoder", "text_config")):
        raise BaseError(
            f"base {spec.model}: {name} has a config of its own for each half; use one with one for both, such as T5, mT5, BART or mBART"
        )
    if config.model_type in UNSTEADY:
        raise BaseError(f"base {spec.model}: {name}'s answers change with how far rows are filled; use another one, such as T5 or BART")
    return "seq2seq"


def _tokenizer(folder: Path, config: Any, spec: BaseSpec) -> Any:
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except FAULTS as fault:
        raise BaseError(f"base {spec.model}: tokenizer cannot be loaded from {folder}: {one_line(fault)}; fetch its files again") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise BaseError(f"base {spec.model}: its tokenizer has no padding, end or unknown token; set pad_token in tokenizer_config.json")
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _check_length(tokenizer: Any, config: Any, spec: BaseSpec) -> None:
    windows = [getattr(config, f"max_{half}position_embeddings", None) or 10**9 for half in ("", "encoder_", "decoder_")]
    longest = min(int(tokenizer.model_max_length), *map(int, windows))
    if spec.max_tokens > longest:
        raise BaseError(f"base {spec.model}: max_tokens is {spec.max_tokens}, the model takes {longest}; set base.max_tokens = {longest}")


def _check_complete(base: Base, model: nn.Module, report: dict[str, Any]) -> None:
    """Only a head may be missing from the weights: a trunk filled with random numbers would differ from site to site."""
    heads = tuple(f"{name}." for name in head_modules(model)) if base.family in CLASSIFIERS else ()
    lacking = sorted(key for key in report["missing_keys"] if not (heads and key.startswith(heads)))
    wrong = sorted(str(key) for key in report["mismatched_keys"])
    if lacking or wrong or report["error_msgs"]:
        found = f"missing {lacking[:3]}" if lacking else f"misshapen {(wrong or list(report['error_msgs']))[:3]}"
        raise BaseError(f"base {base.spec.model}: the weights do not fit {type(model).__name__}: {found}; use a checkpoint that has them")


def _trunk(spec: BaseSpec, model: nn.Module) -> nn.Module:
    trunk = getattr(model, str(model.base_model_prefix), None)
    if not isinstance(trunk, nn.Module):
        return _gathered(spec, model)
    return trunk


def _gathered(spec: BaseSpec, model: Any) -> nn.Module:
    """The trunk of a model that holds its parts itself, as T5's does: the architecture's bare form around these very parts."""
    try:
        with quiet_transformers(), torch.device("meta"):
            trunk: nn.Module = AutoModel.from_config(model.config, dtype=torch.float32, trust_remote_code=False)
        for name, _ in list(trunk.named_children()):
            setattr(trunk, name, model.get_submodule(name))
    except FAULTS:
        raise BaseError(
            f"base {spec.model}: {type(model).__name__} has no trunk {model.base_model_prefix!r}; use another architecture"
        ) from None
    return trunk.requires_grad_(False).eval()
