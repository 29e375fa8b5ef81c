"""Whether a method is a change of the base's own weights: the base with the weights that the adapter makes answers as the adapter does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS, SPECS
from fedpeft.methods.targets import is_linear

KINDS = sorted(METHODS)
BIASED = {"beft", "ssf"}
"""What merges into biases, where the base has them; the tiny Llama has none."""
OF_ONE_TASK = {"poly"}
"""A change of weights for each task, and no single one for all of them."""

pytestmark = pytest.mark.filterwarnings("ignore")


def written(live: nn.Module, shell: nn.Module, plain: nn.Module) -> nn.Module:
    """``plain`` with every weight and bias as the layer at its name in ``shell`` shows it on unit inputs."""
    live.eval()
    places = dict(shell.named_modules())
    for name, module in plain.named_modules():
        there = places.get(name)
        if there is None:
            continue
        if isinstance(module, nn.Embedding):
            module.weight.data = there(torch.arange(module.num_embeddings)[None])[0]
        elif is_linear(module):
            _write_linear(module, there)
        elif type(module).__name__.endswith("Norm"):
            _write_norm(module, there)
    return plain


def _write_norm(module: nn.Module, there: nn.Module) -> None:
    x = torch.randn(1, 1, module.weight.shape[0], generator=torch.Generator().manual_seed(0))
    plus, minus = there(x)[0, 0], there(-x)[0, 0]
    module.weight.data.fill_(1.0)
    if getattr(module, "bias", None) is not None:
        module.bias.data.zero_()
    weight = (plus - minus) / 2.0 / module(x)[0, 0]
    module.weight.data = weight
    if getattr(module, "bias", None) is not None:
        module.bias.data = (plus + minus) / 2.0


def _write_linear(module: nn.Module, there: nn.Module) -> None:
    weight = module.weight
    shift = there(torch.zeros(1, 1, weight.shape[1]))[0]
    module.weight.data = (there(torch.eye(weight.shape[1])[None])[0] - shift).T.contiguous()
    if module.bias is not None:
        module.bias.data = shift[0]


def same(case, values) -> bool:
    """Whether the base with the adapter's weights answers as the adapter does."""
    model, live = case.attach()
    case.write(live, values)
    want = case.logits(live)
    base = case.make(case.model)(**case.inputs).logits
    try:
        got = written(live, model, case.make(case.model))(**case.inputs).logits
    except (AdapterError, RuntimeError):
        return False  # a layer that needs the others around it is no layer of the base
    moved = float((want - base[:, -want.shape[1] :]).norm())
    assert moved > 1e-3
    return float((got[:, -want.shape[1] :] - want).norm()) < 1e-5 * moved + 2e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(set(KINDS) - OF_ONE_TASK))
def test_only_what_is_called_mergeable_is_a_change_of_weights(kind, case_of, shake):
    case = case_of(kind)
    case = dataclasses.replace(case, model="bert", head=case_of("bitfit").head) if kind in BIASED else case
    model, live = case.attach()
    assert same(case, shake(case.values(live, model.config), case.moving(live))) == SPECS[kind].mergeable
