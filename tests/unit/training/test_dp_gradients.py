"""Gradients per example from one backward, against plain backwards of one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedpeft.bases.spec import HeadSpec
from fedpeft.errors import PrivacyError
from fedpeft.methods import METHODS
from fedpeft.tasks.filled import IGNORED
from fedpeft.tasks.protocol import Batch
from fedpeft.training import dp_rows, dp_rules
from fedpeft.training.dp_recorder import Recorder
from fedpeft.training.dp_rows import Rows, outer
from fedpeft.training.dp_sums import rows_of, singles, terms_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
IDS = torch.tensor([[5, 9, 12, 33, 21, 8], [7, 3, 40, 2, 0, 0], [7, 3, 4, 0, 0, 0]])
WEIGHTS = torch.tensor([1.0, -2.0, 0.5])

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
    "albert": lambda: AlbertForSequenceClassification(AlbertConfig(**SIZES, embedding_size=16, num_labels=3)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=1)),
}
CASES = [
    ("lora", {"targets": ("all",)}, ("bert", "albert", "llama", "gpt2")),
    ("lora", {"r": 2, "extra": 2}, ("bert", "llama")),
    ("core", {"r": 4}, ("bert",)),
    ("ia3", {}, ("bert", "llama", "gpt2")),
    ("bottleneck", {"dim": 8}, ("bert", "llama")),
    ("bitfit", {}, ("bert", "albert", "gpt2")),
    ("prompt", {"tokens": 3}, ("bert", "llama")),
    ("prefix", {"tokens": 3}, ("bert", "gpt2")),
]
GRID = [(method, options, name) for method, options, names in CASES for name in names]


def adapted(name: str, method: str, **options: Any) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A tiny model with a method on it, no tensor of which is zero."""
    torch.manual_seed(0)
    chosen, causal = METHODS[method](**options), name in ("llama", "gpt2")
    model = chosen.attach(MODELS[name]().eval(), HeadSpec("lm") if causal else HeadSpec("classification", ("a", "b", "c")))
    parameters = {key: parameter for key, (_, parameter) in chosen.entries(model).items()}
    for parameter in parameters.values():
        parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return model, parameters


def padded_loss(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of classes or of next tokens, padding left out."""
    logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    if logits.dim() == 2:
        return F.cross_entropy(logits, labels, reduction="sum")
    real = ids[:, 1:] != 0
    return F.cross_entropy(logits[:, :-1][real], ids[:, 1:][real], reduction="sum")


def packed_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(**batch.inputs, use_cache=False).logits[0]
    return F.cross_entropy(logits, batch.labels[0], reduction="sum", ignore_index=IGNORED)


def packed_row() -> Batch:
    lengths = [6, 4, 3]
    ids = torch.cat([row[:length] for row, length in zip(IDS, lengths, strict=True)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    labels = torch.cat([torch.cat([row[1:length], torch.tensor([IGNORED])]) for row, length in zip(IDS, lengths, strict=True)])
    return Batch({"input_ids": ids[None], "position_ids": positions[None]}, labels[None], 3, len(ids))


def gradients(parameters: dict[str, nn.Parameter], loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(parameters.items(), found, strict=True)}


def compare(recorder: Recorder, alone: list[dict[str, torch.Tensor]], relative: float) -> None:
    """Norms relative to themselves, weighted sums relative to the norm of the whole."""
    norms = torch.stack([torch.stack([g.double().square().sum() for g in one.values()]).sum().sqrt() for one in alone])
    torch.testing.assert_close(recorder.squares().double().sqrt(), norms, rtol=relative, atol=0)
    whole, off = 0.0, 0.0
    for key in alone[0]:
        expected = sum(weight * one[key].double() for weight, one in zip(WEIGHTS.tolist(), alone, strict=True))
        found = recorder.found[key].weighted(WEIGHTS).double().reshape(expected.shape) if key in recorder.found else 0.0
        whole, off = whole + float(expected.square().sum()), off + float((expected - found).square().sum())
    assert off**0.5 <= 3 * relative * whole**0.5


def examine(model, parameters, method, together, apart, rows, relative=1e-6):
    """Record ``together()`` and compare with each of ``apart``; no gradient reaches a parameter."""
    recorder = Recorder(parameters, method)
    with recorder.expect(rows):
        together().backward()
    assert all(parameter.grad is None for parameter in parameters.values())
    compare(recorder, [gradients(parameters, one()) for one in apart], relative)


@pytest.mark.parametrize(("method", "options", "name"), GRID, ids=[f"{m}-{n}-{i}" for i, (m, _, n) in enumerate(GRID)])
def test_padded_rows_equal_examples_alone(method, options, name):
    model, parameters = adapted(name, method, **options)
    labels = torch.tensor([0, 2, 1])
    apart = [lambda n=n: padded_loss(model, IDS[n : n + 1, : int((IDS[n] != 0).sum())], labels[n : n + 1]) for n in range(3)]
    examine(model, parameters, method, lambda: padded_loss(model, IDS, labels), apart, Rows(3))


@pytest.mark.parametrize("method", ["lora", "ia3", "bottleneck", "prompt", "prefix"])
def test_packed_rows_equal_examples_alone(method):
    model, parameters = adapted("llama", method)
    batch = packed_row()
    apart = [lambda one=one: packed_loss(model, one) for one in singles(batch)]
    examine(model, parameters, method, lambda: packed_loss(model, batch), apart, rows_of(batch))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_float64_agrees_to_its_own_precision(name):
    model, parameters = adapted(name, "lora", targets=("all",))
    model.double()
    labels = torch.tensor([0, 2, 1])
    apart = [lambda n=n: padded_loss(model, IDS[n : n + 1], labels[n : n + 1]) for n in range(3)]
    examine(model, parameters, "lora", lambda: padded_loss(model, IDS, labels), apart, Rows(3), 1e-12)


def test_frozen_roles_are_not_recorded():
    model, parameters = adapted("llama", "lora")
    trained = {key: parameter for key, parameter in parameters.items() if ".lora_B." in key}
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in trained)
    examine(
        model, trained, "lora", lambda: padded_loss(model, IDS, IDS),
        [lambda n=n: padded_loss(model, IDS[n : n + 1], IDS) for n in range(3)], Rows(3),
    )  # fmt: skip


@pytest.mark.parametrize("quantization", ["nf4", "bf16"])
def test_quantized_and_bf16_bases(shared_models, quantization):
    from fedpeft.adapters import attach, make_spec
    from fedpeft.bases import BaseSpec, load_base
    from fedpeft.methods import Lora

    base = load_base(BaseSpec(str(shared_models / "stories260k"), max_tokens=64, quantization=quantization), "cpu")
    spec = make_spec("t", base, Lora(r=4), HeadSpec("lm"))
    with attach(base, spec) as live:
        live.flat.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.05)
        batch = packed_row()
        recorder = Recorder(live.parameters, "lora")
        with recorder.expect(rows_of(batch)):
            packed_loss(live.model, batch).backward()
        alone = [gradients(live.parameters, packed_loss(live.model, one)) for one in singles(batch)]
        compare(recorder, alone, 0.05)


@pytest.mark.parametrize("method", ["vera", "adamss", "ln-tuning", "ssf", "houlsby", "pfeiffer", "parallel", "compose"])
def test_more_methods_are_exact(method):
    model, parameters = adapted("bert", method)
    labels = torch.tensor([0, 2, 1])
    apart = [lambda n=n: padded_loss(model, IDS[n : n + 1], labels[n : n + 1]) for n in range(3)]
    examine(model, parameters, method, lambda: padded_loss(model, IDS, labels), apart, Rows(3), 2e-6)


@pytest.mark.parametrize(
    "method", ["dora", "loha", "oft", "hra", "vblora", "compacter", "reft", "p-tuning", "molora", "sparse-seed", "unipelt"]
)
def test_methods_without_exact_gradients_are_refused_by_name(method):
    model, parameters = adapted("llama", "lora", dora=True) if method == "dora" else adapted("llama", method)
    with (
        pytest.raises(PrivacyError, match=rf"method {method} uses .* in a way whose gradient|cannot be told apart"),
        Recorder(parameters, method).expect(Rows(3)),
    ):
        padded_loss(model, IDS, IDS).backward()


def test_dropout_masks_are_one_for_each_example():
    rows, x = Rows(3, (2, 4, 1)), torch.ones(1, 7, 1000)
    drawn = dp_rules.mask(rows, x, 0.25)
    assert drawn.shape == (1, 7, 1000)
    parts = drawn[0].split([2, 4, 1])
    assert all(torch.equal(part, part[:1].expand_as(part)) for part in parts)
    assert not torch.equal(parts[0][0], parts[1][0])
    assert float(drawn.mean()) == pytest.approx(1.0, abs=0.05)
    assert dp_rules.mask(Rows(7), torch.ones(7, 2, 4), 0.5).shape == (7, 1, 4)


def test_dropout_gradients_are_those_of_the_masks_drawn():
    model, parameters = adapted("llama", "lora", dropout=0.4)
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.training = True
    torch.manual_seed(3)
    recorder = Recorder(parameters, "lora")
    with recorder.expect(Rows(3)):
        padded_loss(model, IDS, IDS).backward()
    found = {key: one.weighted(torch.ones(3)) for key, one in recorder.found.items()}
    name = next(key for key in parameters if ".lora_B." in key)
    losses = []
    for step in (1e-2, -1e-2):
        torch.manual_seed(3)
        with torch.no_grad():
            parameters[name].add_(found[name], alpha=step)
        with recorder.expect(Rows(3)):
            losses.append(float(padded_loss(model, IDS, IDS).detach()))
        with torch.no_grad():
            parameters[name].sub_(found[name], alpha=step)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(found[name].square().sum()), rel=2e-2)


@given(n=st.integers(1, 4), t=st.integers(1, 9), m=st.integers(1, 7), k=st.integers(1, 7), packed=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_both_forms_of_a_gradient_agree(n, t, m, k, packed, seed):
    torch.manual_seed(seed)
    lengths = [1 + (i + t) % 5 for i in range(n)] if packed else [t] * n
    left, right = ([torch.randn(length, width, dtype=torch.float64) for length in lengths] for width in (m, k))
    weights = torch.randn(n, dtype=torch.float64)
    whole = torch.stack([one.t() @ other for one, other in zip(left, right, strict=True)])
    parts = (left, right) if packed else (torch.stack(left), torch.stack(right))
    for form in (outer(*parts), dp_rows.Factors(*parts), dp_rows.Whole(whole.transpose(1, 2), turned=True)):
        torch.testing.assert_close(form.squares(), whole.square().sum((1, 2)))
        torch.testing.assert_close(form.weighted(weights), torch.einsum("n,nmk->mk", weights, whole))
        torch.testing.assert_close(form.dense(), whole.flatten(1))
    chosen = outer(*parts)
    assert isinstance(chosen, dp_rows.Factors) == (sum(lengths) * (m + k) < n * m * k)


@pytest.mark.parametrize(("shape", "rows"), [((2, 5, 4), Rows(3)), ((1, 8, 4), Rows(2, (3, 4))), ((7, 4), Rows(3))])
def test_activations_that_cannot_be_told_apart_are_refused(shape, rows):
    with pytest.raises(PrivacyError, match=r"cannot be told apart into \d examples"):
        rows.split(torch.zeros(shape))


def test_a_packed_row_of_other_examples_is_refused():
    with pytest.raises(PrivacyError, match="3 sequences of 2 examples, so that rows mix"):
        rows_of(replace(packed_row(), examples=2))


def test_terms_and_parts_of_a_packed_row():
    batch = packed_row()
    assert terms_of(batch).tolist() == [5.0, 3.0, 2.0]
    assert terms_of(Batch({}, torch.tensor([1, 0]), 2, 0)).tolist() == [1.0, 1.0]
    assert [one.tokens for one in singles(batch)] == [6, 4, 3]
    assert [part.shape[0] for part in rows_of(batch).split(torch.zeros(1, 13, 2, 4))] == [12, 8, 6]
    assert np.all([len(part) for part in rows_of(batch).split(torch.zeros(13, 4))] == [6, 4, 3])
