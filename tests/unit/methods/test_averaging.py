"""What the plain mean of adapters is to the mean of what they do: every method against its declared class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.methods import METHODS, SPECS
from fedpeft.methods.targets import is_linear
from fedpeft.methods.tuners import ROWS

KINDS = sorted(METHODS)
BY_TURNS = sorted(kind for kind in KINDS if kind in ROWS and "alternating" in SPECS[kind].exact_with)

pytestmark = pytest.mark.filterwarnings("ignore")


def probes(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name of each layer of ``model`` that a method may change -> inputs on which its answers are compared."""
    draw = torch.Generator().manual_seed(1)
    found = {}
    for name, module in model.named_modules():
        if ".1." in name:
            continue  # the second block is as the first
        if isinstance(module, nn.Embedding):
            found[name] = torch.arange(min(module.num_embeddings, 50))[None]
        elif is_linear(module) or type(module).__name__.endswith("Norm"):
            width = module.nx if hasattr(module, "nx") else getattr(module, "in_features", None) or module.weight.shape[0]
            found[name] = torch.randn(1, 8, width, generator=draw)
    return found


def answers(live: nn.Module, shell: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the probed layers answer, one after the other, float64; layers whose place a method has taken are left out."""
    live.eval()
    names = dict(shell.named_modules())
    with torch.no_grad():
        return torch.cat([names[name](x).double().flatten() for name, x in inputs.items() if name in names])


def losses_of_averaging(case, shake, free=None, common=None):
    """(in the layers, in the logits): how far the mean adapter lies from the mean of two adapters, relative to what they change.

    A part that no site changes counts as not a number.
    """
    model = case.make(case.model)
    inputs = probes(model)
    model, live = case.attach(model)
    entries = case.method.entries(live)
    moving = {name for name in case.moving(live) if entries[name][0] != "head"}
    start = shake(case.values(live, model.config), moving, seed=9)
    chosen = {name for name in moving if free is None or entries[name][0] in free}
    sites = [shake(start, chosen, seed) for seed in range(2)]
    move = common or (lambda values: values)

    def look(values):
        case.write(live, values)
        return answers(live, model, inputs), case.logits(live).double().flatten()

    mean = {name: torch.stack([move(site)[name] for site in sites]).mean(0) for name in start}
    seen, origin = [look(site) for site in sites], look(start)
    middle = look(mean if common is None else back(mean))
    result = []
    for part in (0, 1):
        target = torch.stack([site[part] for site in seen]).mean(0)
        moved = float((target - origin[part]).norm())
        result.append(float((middle[part] - target).norm()) / moved if moved > 1e-9 else np.nan)
    return tuple(result)


@pytest.mark.parametrize("case", KINDS, indirect=True)
def test_the_mean_of_adapters_is_what_the_class_says(case, shake):
    spec = SPECS[case.kind]
    layers, logits = losses_of_averaging(case, shake)
    if spec.average == "linear":
        assert layers < 1e-5
    else:
        assert np.nanmax([layers, logits]) > 1e-4


@pytest.mark.parametrize("case", BY_TURNS, indirect=True)
def test_alternating_averages_exactly_what_it_is_declared_for(case, shake):
    assert losses_of_averaging(case, shake, free={"B", "shift"})[0] < 1e-5
    assert losses_of_averaging(case, shake, free={"A", "M", "shift"})[0] < 1e-5


def polar(values):
    out = dict(values)
    for name in [name for name in values if name.endswith("road_theta")]:
        alpha = name.replace("theta", "alpha")
        out[name], out[alpha] = values[alpha] * torch.cos(values[name]), values[alpha] * torch.sin(values[name])
    return out


def back(values):
    out = dict(values)
    for name in [name for name in values if name.endswith("road_theta")]:
        alpha = name.replace("theta", "alpha")
        out[name], out[alpha] = torch.atan2(values[alpha], values[name]), torch.hypot(values[alpha], values[name])
    return out


@pytest.mark.parametrize("case", ["road"], indirect=True)
def test_road_averages_exactly_in_cartesian_coordinates(case, shake):
    assert losses_of_averaging(case, shake)[0] > 1e-4
    assert losses_of_averaging(case, shake, common=polar)[0] < 1e-5
