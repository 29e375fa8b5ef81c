"""The loss without logits: its values and gradients, what it keeps, and the models in which it may stand in for the head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fedpeft.tasks import chunked
from fedpeft.tasks.chunked import head_of, token_cross_entropy, whole_logits
from fedpeft.tasks.likelihood import token_losses
from fedpeft.tasks.protocol import Batch

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "intermediate_size": 64, "num_attention_heads": 4}


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, **more)).requires_grad_(False).eval()


def batch() -> Batch:
    draw = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, 50, (2, 1, 24), generator=draw)
    labels[:, ::3] = -100
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    return Batch({"input_ids": ids, "position_ids": positions}, labels, 2, 24)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 6), st.integers(1, 11)),
    chunk=st.integers(1, 60),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_losses_and_any_weighting_of_them_equal_a_float64_oracle(sizes, chunk, bias, seed):
    count, width, words = sizes
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(count, width, generator=draw) * 3, torch.randn(words, width, generator=draw)
    offset = torch.randn(words, generator=draw) if bias else None
    labels, weights = torch.randint(0, words, (count,), generator=draw), torch.randn(count, generator=draw)
    theirs = hidden.double().requires_grad_()
    logits = theirs @ weight.double().t() + (0 if offset is None else offset.double())
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (wanted * weights.double()).sum().backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "LOGITS", chunk)
        ours = hidden.clone().requires_grad_()
        found = token_cross_entropy(ours, weight, offset, labels)
        (found * weights).sum().backward()
        with torch.no_grad():
            assert torch.equal(token_cross_entropy(hidden, weight, offset, labels), found.detach())
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_learns_the_same_from_either_form(tied, monkeypatch):
    model = llama(tie_word_embeddings=tied)
    monkeypatch.setattr(chunked, "LOGITS", 150)
    trained = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    found = {}
    for whole in (False, True):
        with whole_logits(whole):
            losses = token_losses(model, batch())
        found[whole] = losses.detach(), *torch.autograd.grad(losses.sum(), trained)
    for ours, theirs in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert "forward" not in model.lm_head.__dict__


def test_no_logits_are_kept(monkeypatch):
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    sizes: list[int] = []

    def saved(tensor):
        sizes.extend(tensor.shape[-1:])
        return tensor

    for whole in (False, True):
        sizes.clear()
        with whole_logits(whole), torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            token_losses(model, batch())
        assert (50 in sizes) == whole


def test_under_autocast_the_loss_is_that_of_the_head_under_autocast():
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    found = []
    for whole in (False, True):
        with whole_logits(whole), torch.autocast("cpu", torch.bfloat16):
            found.append(token_losses(model, batch()))
    torch.testing.assert_close(found[0], found[1])


def test_a_head_that_is_not_last_or_not_plain_or_trains_keeps_its_logits():
    assert head_of(llama()) is not None
    for kind, config in ((Gemma2ForCausalLM, Gemma2Config), (CohereForCausalLM, CohereConfig)):
        capped = kind(config(**SHAPE, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2))
        assert head_of(capped.requires_grad_(False)) is None
    trained, hooked = llama(), llama()
    trained.lm_head.weight.requires_grad_()
    hooked.lm_head.register_forward_hook(lambda *_: None)
    assert head_of(trained) is None
    assert head_of(hooked) is None
    with whole_logits():
        assert head_of(llama()) is None
