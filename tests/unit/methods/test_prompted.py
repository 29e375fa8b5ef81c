"""Soft prompts line up with the caller's tokens, in padded and in packed rows."""

from __future__ import annotations

import pytest
import torch

from fedpeft.bases.spec import HeadSpec
from fedpeft.errors import AdapterError
from fedpeft.methods import PrefixTuning, PromptTuning

BOTH = pytest.mark.parametrize("method", [PromptTuning(3), PrefixTuning(3)], ids=["prompt", "prefix"])


def attached(method, model):
    live = method.attach(model, HeadSpec("lm"))
    for _, parameter in method.entries(live).values():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.5
    return live.eval()


@BOTH
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_packing_and_single_rows_agree(method, name, make):
    live = attached(method, make(name))
    one, two = torch.tensor([[5, 9, 12, 33]]), torch.tensor([[7, 3]])
    with torch.no_grad():
        alone = [live(input_ids=row).logits for row in (one, two)]
        padded = live(torch.tensor([[5, 9, 12, 33], [7, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])).logits
        packed = live(torch.cat([one, two], 1), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1]])).logits
        kept = live(torch.cat([one, two], 1), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1]]), logits_to_keep=torch.tensor([1, 5])).logits
        some = live(input_ids=one, logits_to_keep=torch.tensor([1, 3])).logits
        last = live(input_ids=one, logits_to_keep=1).logits
    assert padded.shape == (2, 4, 50)
    assert packed.shape == (1, 6, 50)
    assert torch.allclose(padded[:1], alone[0], atol=1e-6)
    assert torch.allclose(padded[1:, :2], alone[1], atol=1e-6)
    assert torch.allclose(packed, torch.cat(alone, 1), atol=1e-6)
    assert torch.allclose(kept, packed[:, [1, 5]], atol=1e-6)
    assert torch.allclose(some, alone[0][:, [1, 3]], atol=1e-6)
    assert torch.allclose(last, alone[0][:, -1:], atol=1e-6)


@BOTH
def test_padding_does_not_change_a_classification(method, make, head_of):
    model = make("bert")
    live = method.attach(model, head_of("bert")).eval()
    with torch.no_grad():
        alone = live(input_ids=torch.tensor([[7, 3]]), attention_mask=torch.ones(1, 2)).logits
        padded = live(torch.tensor([[5, 9, 12, 33], [7, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])).logits
    assert torch.allclose(padded[1:], alone, atol=1e-6)


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_generation_reads_the_prompt(method, make):
    live = attached(method, make("llama"))
    ids = torch.tensor([[5, 9, 12]])
    made = live.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    grown = ids
    with torch.no_grad():
        for _ in range(3):
            grown = torch.cat([grown, live(input_ids=grown).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, grown)


def test_checkpointing_a_prefix_is_refused_and_a_prompt_is_not(make):
    with pytest.raises(AdapterError, match="drops the cache"):
        attached(PrefixTuning(3), make("llama")).activation_checkpointing_enable()
    attached(PromptTuning(3), make("llama")).activation_checkpointing_enable()


def test_detach_wants_what_attach_gave(make):
    model = make("llama")
    attached(PromptTuning(3), model)
    with pytest.raises(AdapterError, match="pass the module that attach returned"):
        PromptTuning(3).detach(model)
