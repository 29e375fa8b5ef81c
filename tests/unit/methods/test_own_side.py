"""Ladder side tuning and visual prompts: what reaches the base, and each against a slow forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedpeft.bases.spec import HeadSpec
from fedpeft.errors import AdapterError
from fedpeft.methods.own import OWN
from fedpeft.tensors import Entry


def begin(method, model, head, noise=0.1):
    live = method.attach(model, head)
    rng = np.random.default_rng(0)
    for name, (role, parameter) in method.entries(live).items():
        value = method.initial(Entry(role, name, tuple(parameter.shape)), rng, model.config)
        parameter.data = torch.from_numpy(value + noise * rng.standard_normal(value.shape, np.float32))
    return live


def saved_bytes(live, inputs):
    """Bytes that autograd keeps between forward and backward, parameters aside."""
    seen = {p.data_ptr() for p in live.parameters()}
    total = 0

    def keep(tensor):
        nonlocal total
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = live(**inputs).logits.square().mean()
    loss.backward()
    return total


def big(kind):
    """A taller llama than the fixtures', where the blocks outweigh the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 192, "vocab_size": 50}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return begin(OWN[kind](), LlamaForCausalLM(LlamaConfig(**sizes)).eval(), HeadSpec("lm"))


def test_a_ladder_needs_no_backward_through_the_blocks():
    live, reached = big("lst"), []
    for block in live.model.layers:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda layer, inputs, output: reached.append(inputs[0].requires_grad or output.requires_grad))
    live(input_ids=torch.arange(20)[None]).logits.square().mean().backward()
    assert len(reached) == 6 * 7
    assert not any(reached)
    assert all(p.grad is not None for _, p in OWN["lst"]().entries(live).values())


def test_a_ladder_keeps_fewer_activations():
    inputs = {"input_ids": torch.arange(40).view(2, 20)}
    ladder, serial = saved_bytes(big("lst"), inputs), saved_bytes(big("houlsby"), inputs)
    assert ladder < 0.25 * serial, (ladder, serial)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_a_ladder_is_its_formula(model, make, head_of, rows):
    method = OWN["lst"](reduction=4)
    live = begin(method, make(model), head_of(model))
    trunk = live.base_model
    own = {name.removeprefix("base_model.model."): p.detach().double() for name, (_, p) in method.entries(live).items()}
    paths = sorted({name.partition(".lst.")[0] for name in own if ".lst." in name})
    with torch.no_grad():
        states = {}
        for path in paths:
            live.get_submodule(path).register_forward_hook(lambda m, i, out, path=path: states.__setitem__(path, _first(out)))
        got = trunk(**rows)
        after = states[paths[-1]].double()
        method.detach(live)
        trunk(**rows)
    side = None
    for path in paths:
        read = F.layer_norm(states[path].double(), (32,)) @ own[f"{path}.lst.ladder.weight"].t()
        gate = torch.sigmoid(10 * own[f"{path}.lst.gate"]) if side is not None else 0.0
        mixed = read if side is None else gate * side + (1 - gate) * read
        side = mixed + F.gelu(mixed) @ own[f"{path}.lst.rung.weight"].t()
    want = states[paths[-1]].double() + side @ own[f"{paths[-1]}.lst.top.weight"].t()
    assert torch.allclose(after, want, atol=1e-5)
    assert torch.isfinite(got.last_hidden_state).all()


@pytest.mark.parametrize("kind", ["lst", "parallel", "reft", "sparse-seed"])
def test_activation_checkpointing_changes_no_gradient(kind):
    gradients = []
    for checkpointing in (False, True):
        live = big(kind).train()
        if checkpointing:
            live.activation_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):
            live(input_ids=torch.arange(20)[None]).logits.square().mean().backward()
        gradients.append([p.grad for _, p in OWN[kind]().entries(live).values()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_a_ladder_holds_no_states_after_inference():
    live = big("lst")
    with torch.no_grad():
        live(input_ids=torch.arange(20)[None])
    act = next(iter(live.model.layers[-1]._forward_hooks.values()))
    assert act.args[1] == {}


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3)).eval()


@pytest.mark.parametrize("deep", [True, False])
def test_visual_prompts_pass_through_the_blocks_and_leave(deep):
    model, method = vit(), OWN["vpt"](tokens=5, deep=deep)
    images = torch.randn(2, 3, 16, 16)
    live = begin(method, model, HeadSpec("classification", ("a", "b", "c")))
    prompts = {name: p.detach() for name, (role, p) in method.entries(live).items() if role == "prompt"}
    assert [tuple(p.shape) for p in prompts.values()] == [(5, 32)] * (3 if deep else 1)
    lengths = []
    for block in model.vit.layers:
        block.attention.register_forward_pre_hook(
            lambda m, args, named: lengths.append((args[0] if args else named["hidden_states"]).shape[1]), with_kwargs=True
        )
    with torch.no_grad():
        got, last = live(images).logits, model.vit(images).last_hidden_state
        assert lengths == [1 + 5 + 16] * 6
        assert last.shape == (2, 17, 32)
        method.detach(live)
        states = model.vit.embeddings(images)
        for number, block in enumerate(model.vit.layers):
            if number == 0 or deep:
                prompt = prompts[f"base_model.model.vit.layers.{number}.vpt.prompt"].expand(2, -1, -1)
                rest = states[:, 1:] if number == 0 else states[:, 6:]
                states = torch.cat((states[:, :1], prompt, rest), 1)
            states = _first(block(states))
        want = model.classifier(model.vit.layernorm(states)[:, 0])
    assert torch.allclose(got, want, atol=1e-6)


def test_visual_prompts_refuse_models_without_images(make, head_of):
    with pytest.raises(AdapterError, match="takes no images; use prompt"):
        OWN["vpt"]().attach(make("llama"), head_of("llama"))
