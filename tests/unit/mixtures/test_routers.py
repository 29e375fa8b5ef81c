"""Token routers on tensors are those in numpy, and a bank under them is the loop over tokens and experts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedpeft.errors import AdapterError
from fedpeft.mixtures import Bank
from fedpeft.mixtures.routers import routed
from fedpeft.routing import ArrowRouter, GateRouter, MeanRouter, SpectrRouter, derive
from fedpeft.routing.cardfile import lora_products


def routers(rng, k, ranks=(1, 2, 4), width=8):
    """One of each kind over three adapters; the second has no prototype at module ``n``."""

    def table(shape):
        made = {
            name: {"m": rng.standard_normal(shape(r)).astype(np.float32) * size}
            for name, r, size in zip("abc", ranks, (1, 9, 0.1), strict=True)
        }
        return made | {"a": {**made["a"], "n": made["a"]["m"]}, "c": {**made["c"], "n": made["c"]["m"]}}

    vectors, spectra = table(lambda r: (width,)), table(lambda r: (r, width))
    return [GateRouter(vectors, k), ArrowRouter(vectors, k, 0.7), SpectrRouter(spectra, k), SpectrRouter(spectra, k, unit=False)]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 4))
@example(seed=396, k=2)  # scores so far apart that a softmax of the lesser is 0
def test_weights_are_those_of_numpy(seed, k):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6, 8)).astype(np.float32)
    for router in routers(rng, k):
        (term,) = routed(router).terms
        for module in ("m", "n"):
            scores = term.router(module, torch.from_numpy(x))
            best, places = scores.topk(term.k, -1)
            shares = best.softmax(-1) if term.normalise == "softmax" else best.isfinite() / term.k
            weights = torch.zeros_like(scores).scatter(-1, places, shares)
            assert np.allclose(weights.numpy(), router.weigher(module)(x), atol=2e-5)
        assert torch.isinf(term.router("unknown", torch.from_numpy(x))).all()


def looped(base, every, router):
    """Every layer of the base adds, for every token and expert, the weighted product of that expert alone, in float64."""
    found = {name: lora_products(one.tensors) for name, one in every.items()}

    def add(module, layer, inputs, output):
        x = inputs[0].flatten(0, -2).numpy()
        weights, more = router.weigher(module)(x), np.zeros((len(x), output.shape[-1]))
        for token, row in enumerate(x.astype(float)):
            for place, name in enumerate(router.names):
                b, a = found[name][module]
                more[token] += weights[token, place] * (b.astype(float) @ (a @ row))
        return output + torch.from_numpy(more).view_as(output).to(output.dtype)

    return [base.model.get_submodule(module).register_forward_hook(partial(add, module)) for module in router.modules]


@pytest.mark.parametrize("kind", ["gate", "arrow", "spectr"])
def test_a_routed_bank_is_the_loop_over_tokens_and_experts(warm, make_adapter, head_of, kind):
    base, head = warm("causal"), head_of("causal")
    rng = np.random.default_rng(3)
    every = {name: make_adapter(name, base, {"kind": "lora", "r": r}, head, r) for name, r in zip("abc", (1, 2, 4), strict=True)}
    cards = {name: derive(one.tensors) for name, one in every.items()}
    gates = {
        name: {module: rng.standard_normal(v.shape).astype(np.float32) for module, v in card.arrows.items()} for name, card in cards.items()
    }
    made = {
        "gate": GateRouter(gates, 2),
        "arrow": ArrowRouter({name: card.arrows for name, card in cards.items()}, 2),
        "spectr": SpectrRouter({name: card.spectra for name, card in cards.items()}, 2),
    }
    router, ids = made[kind], torch.arange(4, 24).view(2, 10)
    with Bank.attach(base, head, every) as bank, torch.no_grad():
        bank.use(routed(router))
        ours = bank.model(input_ids=ids).logits
    handles = looped(base, every, router)
    with torch.no_grad():
        theirs = base.model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_router_without_prototypes_or_tokens_is_refused():
    for router in (MeanRouter(("a",)), ArrowRouter({"a": {}})):
        with pytest.raises(AdapterError, match="weighs no tokens, or has no prototypes"):
            routed(router)
