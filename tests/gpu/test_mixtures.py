"""Mixtures on a CUDA device, the Triton kernels among them, on tiny random models; run with `pytest -m gpu`."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.gpu.card import DEVICE, FUSED, MARKS

from fedpeft.adapters import Adapter, attach, make_spec
from fedpeft.bases import BaseSpec, HeadSpec, load_base
from fedpeft.config import build
from fedpeft.methods import METHODS
from fedpeft.mixtures import Bank, Gates
from fedpeft.tensors import Tensors

pytestmark = MARKS

LM = HeadSpec("lm")
TABLES = {
    "wide": {"kind": "lora", "r": 4, "targets": ["all"]},
    "twin": {"kind": "lora", "r": 4, "targets": ["all"]},
    "deep": {"kind": "lora", "r": 40, "targets": ["all"]},
    "gain": {"kind": "ia3"},
    "bottle": {"kind": "bottleneck", "dim": 5},
    "prompt": {"kind": "prompt", "tokens": 3},
    "prefix": {"kind": "prefix", "tokens": 4},
}
ROWS = ["wide", "gain", "deep", None, "twin", "prompt", "wide", "prefix", "bottle", "deep", "wide"]
WAYS = ["auto", "loop", "batched", "segments", "grouped", *FUSED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("llama")
    words = ["<unk>", "<pad>", "</s>", "<s>", *(f"w{i}" for i in range(60))]
    sizes = {"vocab_size": len(words), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=1)).save_pretrained(place)
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def warm(folder):
    loaded = {}

    def base(quantization="none"):
        if quantization not in loaded:
            loaded[quantization] = load_base(BaseSpec(str(folder), quantization, max_tokens=32), DEVICE)
        return loaded[quantization]

    return base


def crowd(base):
    found = {}
    for seed, (name, table) in enumerate(TABLES.items()):
        spec = make_spec(name, base, build(METHODS, table, "method"), LM)
        flat = np.random.default_rng(seed).normal(0, 0.05, spec.layout.size).astype(np.float32)
        for entry in spec.layout.entries:
            if entry.role == "scale":
                flat[spec.layout.spans[entry.name]] += 1
        found[name] = Adapter(spec, Tensors(spec.layout, flat))
    return found


def batch():
    ids = torch.randint(4, 60, (len(ROWS), 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[5, 3:] = 0, 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def loss(logits):
    return logits.float().square().mean((1, 2)).sum()


def alone(base, adapters, inputs):
    logits, grads = {}, {}
    for name, adapter in adapters.items():
        rows = [row for row, own in enumerate(ROWS) if own == name]
        with attach(base, adapter.spec) as live:
            live.load(adapter.tensors)
            out = live.model(**{key: value[rows] for key, value in inputs.items()}).logits
            loss(out).backward()
            logits |= {row: part.detach() for row, part in zip(rows, out, strict=True)}
            grads[name] = live.grad.clone()
    return logits, grads


def near(found, wanted, tolerance):
    assert float((found.detach().float() - wanted.float()).abs().max()) <= tolerance * max(float(wanted.float().abs().max()), 1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dense", [False, True])
def test_a_mixed_batch_is_each_row_alone(warm, way, dense):
    base, inputs = warm(), batch()
    adapters = crowd(base)
    wanted, grads = alone(base, adapters, inputs)
    with Bank.attach(base, LM, adapters, way=way, dense=dense) as bank:
        bank.use(Gates.rows(ROWS))
        logits = bank.model(**inputs).logits
        loss(logits[[row for row, own in enumerate(ROWS) if own]]).backward()
        for row, part in wanted.items():
            near(logits[row], part, 1e-5)
        for name in adapters:
            near(bank.grad(name), grads[name], 2e-5)


@pytest.mark.parametrize("quantization", ["bf16", "nf4", "int8", "ao-int8"])
def test_quantized_and_half_precision_bases(warm, quantization):
    if quantization == "ao-int8":
        pytest.importorskip("torchao")
    base, inputs = warm(quantization), batch()
    adapters = {name: adapter for name, adapter in crowd(base).items() if name in ("wide", "twin", "deep", "gain", "bottle")}
    rows = [own if own in adapters else None for own in ROWS]
    with torch.autocast(DEVICE, torch.bfloat16):  # as the engine runs them: gains in float32 would widen keys and not queries
        wanted, grads = alone(base, adapters, inputs)
    with Bank.attach(base, LM, adapters) as bank:
        bank.use(Gates.rows(rows))
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = bank.model(**inputs).logits
            loss(logits[[row for row, own in enumerate(rows) if own]]).backward()
        for row, part in wanted.items():
            near(logits[row], part, 3e-2)
        for name in adapters:
            near(bank.grad(name), grads[name], 1e-1)


@pytest.mark.parametrize("way", WAYS)
def test_autocast_agrees_with_the_plain_loop(warm, way):
    base, inputs, found = warm("bf16"), batch(), []
    adapters = {name: adapter for name, adapter in crowd(base).items() if name in ("wide", "twin", "deep")}
    rows = [own if own in adapters else None for own in ROWS]
    for each in ("loop", way):
        with Bank.attach(base, LM, adapters, way=each) as bank, torch.autocast(DEVICE, torch.bfloat16):
            bank.use(Gates.rows(rows))
            logits = bank.model(**inputs).logits
            loss(logits).backward()
            found.append((logits.detach(), torch.cat([bank.grad(name) for name in adapters])))
    near(found[1][0], found[0][0], 3e-2)
    near(found[1][1], found[0][1], 1e-1)


def dense_twin(base):
    """The 4-bit base, its layers unpacked once and for all."""
    from bitsandbytes.functional import dequantize_4bit

    model = copy.deepcopy(base.model)
    for name, layer in list(model.named_modules()):
        if hasattr(getattr(layer, "weight", None), "quant_state"):
            twin = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            twin.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, twin)
    return replace(base, model=model.requires_grad_(False), trunk=model.model)


@pytest.mark.parametrize("way", ["auto", *FUSED])
def test_four_bit_layers_are_multiplied_with_their_adapters(warm, way, monkeypatch):
    """As the plain loop over the unpacked base; bitsandbytes' own product, which would be one more pass, is never called."""
    base, inputs, found = warm("nf4"), batch(), []
    adapters = {name: adapter for name, adapter in crowd(base).items() if name in ("wide", "twin", "deep")}
    rows = [own if own in adapters else None for own in ROWS]
    for model, each in ((dense_twin(base), "loop"), (base, way)):
        with Bank.attach(model, LM, adapters, way=each) as bank, monkeypatch.context() as patch, torch.autocast(DEVICE, torch.bfloat16):
            patch.setattr("bitsandbytes.matmul_4bit", None)
            bank.use(Gates.rows(rows))
            logits = bank.model(**inputs).logits
            loss(logits).backward()
            found.append((logits.detach(), torch.cat([bank.grad(name) for name in adapters])))
    near(found[1][0], found[0][0], 3e-2)
    near(found[1][1], found[0][1], 1e-1)


def test_tokens_and_weights_mix(warm):
    base, inputs, found = warm(), batch(), []
    adapters = {name: adapter for name, adapter in crowd(base).items() if name in ("wide", "twin", "deep")}
    weights = torch.rand(len(ROWS), 3, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    picks = (
        torch.nn.functional.one_hot(torch.randint(0, 3, (len(ROWS), 9), generator=torch.Generator().manual_seed(3)), 3).float().to(DEVICE)
    )
    for way in WAYS:
        with Bank.attach(base, LM, adapters, way=way) as bank:
            for gates in (Gates.weights(list(adapters), weights), Gates.tokens(list(adapters), picks)):
                bank.use(gates)
                bank.zero_grad()
                logits = bank.model(**inputs).logits
                loss(logits).backward()
                found.append((logits.detach(), torch.cat([bank.grad(name) for name in adapters])))
    for place, (logits, grads) in enumerate(found):
        near(logits, found[2 + place % 2][0], 1e-5)
        near(grads, found[2 + place % 2][1], 2e-5)


@pytest.mark.skipif(not FUSED, reason="kernels are not interpreted here; run make kernels")
@pytest.mark.parametrize("rank", [1, 3, 16, 40, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_products_of_segments(rank, dtype):
    from fedpeft.mixtures import kernels

    torch.manual_seed(0)
    slots, wide, out, runs = 5, 70, 132, [(0, 0, 7), (2, 7, 150), (3, 150, 151)]
    count, tolerance = 151, 1e-5 if dtype == torch.float32 else 2e-2
    slab = torch.randn(slots, rank * (wide + out) + 8, device=DEVICE, dtype=dtype)
    a, b = slab[:, : rank * wide].view(slots, rank, wide), slab[:, rank * wide : rank * (wide + out)].view(slots, out, rank)
    x, g = torch.randn(count, wide, device=DEVICE, dtype=dtype), torch.randn(count, out, device=DEVICE, dtype=dtype)
    blocks, segments = (kernels.blocks_of(runs, size, x.device) for size in (kernels.BLOCK_N, count))

    def by_run(left, factor):
        return torch.cat([left[start:stop].double() @ factor[slot].double().t() for slot, start, stop in runs])

    h, gh, y = torch.empty(count, rank, device=DEVICE, dtype=dtype), torch.empty(count, rank, device=DEVICE, dtype=dtype), g.clone()
    kernels.rows(x, a, h, blocks, False)
    near(h, by_run(x, a), tolerance)
    kernels.rows(g, b.transpose(1, 2), gh, blocks, False)
    near(gh, by_run(g, b.transpose(1, 2)), tolerance)
    kernels.rows(h, b, y, blocks, True)
    near(y, g.double() + by_run(h, b), tolerance)
    sinks = torch.ones(slots, slab.shape[1], device=DEVICE)
    into = sinks[:, rank * wide : rank * (wide + out)].view(slots, out, rank)
    kernels.outer(g, h, into, segments)
    wanted = torch.ones(slots, out, rank, device=DEVICE, dtype=torch.float64)
    for slot, start, stop in runs:
        wanted[slot] += g[start:stop].double().t() @ h[start:stop].double()
    near(into, wanted, tolerance)
    assert bool((sinks[:, : rank * wide] == 1).all())
