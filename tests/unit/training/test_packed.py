"""Attention by sequence equals transformers' masked attention over the packed row, forward and backward."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from fedpeft.training import packed

LENGTHS = [5, 1, 17, 2, 40]


def inputs(lengths, vocabulary=64):
    ids = torch.randint(0, vocabulary, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}


def answer(model, batch, switch):
    """Logits, and the gradient of a loss over them with respect to the embeddings."""
    with switch(model):
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, position_ids=batch["position_ids"], use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), embedded.grad


def plain(_model):
    return torch.enable_grad()


def counted(monkeypatch):
    calls, original = [], packed.sdpa_attention_forward

    def count(module, query, *rest, **settings):
        calls.append(query.shape[2])
        return original(module, query, *rest, **settings)

    monkeypatch.setattr(packed, "sdpa_attention_forward", count)
    return calls


@pytest.mark.parametrize("heads", [4, 2])
def test_equal_to_the_masked_row(monkeypatch, heads):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=heads)).eval()
    expected = answer(model, inputs(LENGTHS), plain)
    monkeypatch.setattr(packed, "CALL_COST", 0)
    calls = counted(monkeypatch)
    found = answer(model, inputs(LENGTHS), packed.by_sequence)
    assert calls == LENGTHS * 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_a_real_model_answers_the_same(shared_models, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(shared_models / "stories260k").eval()
    expected = answer(model, inputs(LENGTHS, 512), plain)
    monkeypatch.setattr(packed, "CALL_COST", 0)
    for ours, theirs in zip(answer(model, inputs(LENGTHS, 512), packed.by_sequence), expected, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


def test_windows_small_rows_and_caches_are_left_to_transformers(monkeypatch):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    windowed = MistralForCausalLM(MistralConfig(**shape, num_key_value_heads=4, sliding_window=8)).eval()
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    calls = counted(monkeypatch)
    answer(model, inputs(LENGTHS), packed.by_sequence)
    monkeypatch.setattr(packed, "CALL_COST", 0)
    answer(windowed, inputs(LENGTHS), packed.by_sequence)
    answer(model, inputs([65]), packed.by_sequence)
    assert calls == [65, 65, 65]
    with packed.by_sequence(model):
        said = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(said, model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0))
