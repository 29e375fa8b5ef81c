"""What every entry of METHODS is held to: its declared facts, on the smallest model that it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedpeft.bases.spec import HeadSpec
from fedpeft.config import build, describe
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS, SPECS
from fedpeft.methods.spec import EVERY_BASE, check_base
from fedpeft.methods.targets import is_linear
from fedpeft.methods.tuners import REFUSED, ROWS
from fedpeft.tensors import Entry, Layout

SMALL: dict[str, dict[str, Any]] = {"trainable-tokens": {"tokens": [5, 9]}, "adamss": {"r": 8}}
"""Settings for models 32 wide, where a default does not fit."""
MODELS = {"bitfit": "bert", "attempt": "bert", "vpt": "vit"}
"""The model of a method that does not take the tiny Llama."""
UNTRAINED_BY_DEFAULT: dict[str, set[str]] = {
    "lora": {"M", "A2", "B2"},
    "compose": {"M", "A2", "B2"},
    "lokr": {"M"},
    "glora": {"shift"},
    "peanut": {"inner"},
}
"""Roles that a setting, or a base with biases, brings."""
READS_WEIGHTS = {"adamss", "frod", "shira"}
"""What cannot even be laid out without the base's weights."""
STILL = {"index", "expert"}
"""Roles that no round moves."""
KINDS = sorted(METHODS)

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Case:
    """A method on a tiny model."""

    kind: str
    method: Any
    model: str
    head: HeadSpec
    inputs: dict[str, torch.Tensor]
    make: Callable[[str], nn.Module]

    def attach(self, model: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
        """(model, module to call)."""
        own = self.make(self.model) if model is None else model
        return own, self.method.attach(own, self.head)

    def values(self, live: nn.Module, config: Any, seed: int = 0) -> dict[str, torch.Tensor]:
        """Round-0 values."""
        found = {}
        for name, (role, p) in self.method.entries(live).items():
            first = self.method.initial(Entry(role, name, tuple(p.shape)), np.random.default_rng([seed, *name.encode()]), config)
            found[name] = p.detach().clone() if first is None else torch.from_numpy(np.asarray(first, np.float32))
        return found

    def write(self, live: nn.Module, values: dict[str, torch.Tensor]) -> None:
        """In place, as one flat buffer does it."""
        for name, (_, p) in self.method.entries(live).items():
            p.data = values[name].clone()

    def logits(self, live: nn.Module) -> torch.Tensor:
        """In eval mode."""
        with torch.no_grad():
            return live.eval()(**self.inputs).logits


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)).eval()


@pytest.fixture
def case(request, make, head_of, inputs_of):
    kind = request.param
    model = MODELS.get(kind, "llama")
    method = build(METHODS, {"kind": kind, **SMALL.get(kind, {})}, "method")
    inputs = {"pixel_values": torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)} if model == "vit" else inputs_of(model)
    return Case(kind, method, model, head_of(model), inputs, lambda name: vit() if name == "vit" else make(name))


each = pytest.mark.parametrize("case", KINDS, indirect=True)


def shaken(values, roles=None, seed=0, by=0.05):
    """Values moved at random, those of ``roles`` alone if any are named; positions stay."""
    draw = torch.Generator().manual_seed(seed)
    return {name: v + (by * torch.randn(v.shape, generator=draw) if roles is None or name in roles else 0) for name, v in values.items()}


def test_facts_and_methods_have_the_same_names():
    assert set(SPECS) == set(METHODS)
    assert not set(REFUSED) & set(METHODS)
    assert all(len(reason) > 20 for reason in REFUSED.values())


@pytest.mark.parametrize("kind", KINDS)
def test_facts_are_whole(kind):
    spec = SPECS[kind]
    assert spec.paper
    assert spec.summary
    assert spec.trained
    assert spec.bases <= EVERY_BASE
    assert "none" in spec.bases
    assert 0 < spec.learning_rate < 1
    assert (METHODS[kind].__doc__ or "").strip()


@each
def test_starts_as_declared_learns_and_rebuilds(case):
    model = case.make(case.model)
    before, state = case.logits(model), torch.get_rng_state()
    photo = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    modules = {name: id(module) for name, module in model.named_modules()}
    model, live = case.attach(model)
    assert torch.equal(state, torch.get_rng_state())
    entries = case.method.entries(live)
    roles = {role for role, _ in entries.values()}
    spec = SPECS[case.kind]
    assert roles - {"head"} <= set(spec.tensors)
    assert spec.trained - roles <= UNTRAINED_BY_DEFAULT.get(case.kind, set())
    assert {id(p) for p in live.parameters() if p.requires_grad} <= {id(p) for _, p in entries.values()}
    start = case.values(live, model.config)
    case.write(live, {name: v if entries[name][0] != "head" else entries[name][1].data for name, v in start.items()})
    assert torch.allclose(case.logits(live), before, atol=2e-6) == spec.identity
    trained = train(case, live, spec)
    _, again = case.attach()
    case.write(again, trained)
    assert torch.allclose(case.logits(again), case.logits(live), atol=1e-6)
    case.method.detach(live)
    assert modules == {name: id(module) for name, module in model.named_modules()}
    heads = {id(p) for name, (role, p) in entries.items() if role == "head"}
    for name, p in model.named_parameters():
        assert photo[name][0] == id(p), name
        assert id(p) in heads or torch.equal(photo[name][1], p), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    case.method.detach(case.attach(model)[1])


def train(case, live, spec, steps=4):
    """A few steps at the declared rate lower the loss; the trained values."""
    entries = case.method.entries(live)
    groups = [{"params": [p], "lr": spec.learning_rate * case.method.lr_scale(role)} for role, p in entries.values() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups)
    target = torch.full_like(case.logits(live), 0.3)
    losses = []
    live.train()
    for _ in range(steps):
        torch.manual_seed(0)
        loss = (live(**case.inputs).logits - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    return {name: p.detach().clone() for name, (_, p) in entries.items()}


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


def losses_of_averaging(case, free=None, common=None):
    """(in the layers, in the logits): how far the mean adapter lies from the mean of two adapters, relative to what they change.

    A part that no site changes counts as not a number.
    """
    model = case.make(case.model)
    inputs = probes(model)
    model, live = case.attach(model)
    entries = case.method.entries(live)
    skip = {name for name, (role, _) in entries.items() if role in STILL | {"head"}}
    start = shaken(case.values(live, model.config), set(entries) - skip, seed=9)
    chosen = {name for name, (role, _) in entries.items() if name not in skip and (free is None or role in free)}
    sites = [shaken(start, chosen, seed) for seed in range(2)]
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


@each
def test_the_mean_of_adapters_is_what_the_class_says(case):
    spec = SPECS[case.kind]
    layers, logits = losses_of_averaging(case)
    if spec.average == "linear":
        assert layers < 1e-5
    else:
        assert np.nanmax([layers, logits]) > 1e-4


@pytest.mark.parametrize("case", sorted(k for k in KINDS if k in ROWS and "alternating" in SPECS[k].exact_with), indirect=True)
def test_alternating_averages_exactly_what_it_is_declared_for(case):
    assert losses_of_averaging(case, free={"B", "shift"})[0] < 1e-5
    assert losses_of_averaging(case, free={"A", "M", "shift"})[0] < 1e-5


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
def test_road_averages_exactly_in_cartesian_coordinates(case):
    assert losses_of_averaging(case)[0] > 1e-4
    assert losses_of_averaging(case, common=polar)[0] < 1e-5


CHILD = """
import importlib.util, json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from fedpeft.bases.spec import HeadSpec
from fedpeft.config import build
from fedpeft.methods import METHODS

torch.manual_seed(4711)
def room(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
here, folder = Path(sys.argv[1]), Path(sys.argv[2])
makers = room(here.parent / "conftest.py").MAKERS | {"vit": room(here).vit}
bad = []
for job in json.loads((folder / "jobs.json").read_text()):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = makers[job["model"]]().eval()
    torch.randn(job["n"])
    method = build(METHODS, job["method"], "method")
    held = load_file(folder / f"{job['n']}.safetensors")
    live = method.attach(model, HeadSpec(job["head"], tuple(job["labels"]))).eval()
    for name, (_, p) in method.entries(live).items():
        p.data = held[name]
    with torch.no_grad():
        got = live(**{key[3:]: value for key, value in held.items() if key.startswith("in.")}).logits
    if not torch.allclose(got, held["out"], atol=1e-5):
        bad.append((job["method"]["kind"], float((got - held["out"]).abs().max())))
print(json.dumps(bad))
"""


def test_trained_tensors_alone_rebuild_every_method_in_another_process(make, head_of, inputs_of, tmp_path):
    jobs = []
    for n, kind in enumerate(KINDS):
        model = MODELS.get(kind, "llama")
        method = build(METHODS, {"kind": kind, **SMALL.get(kind, {})}, "method")
        inputs = {"pixel_values": torch.ones(2, 3, 16, 16)} if model == "vit" else inputs_of(model)
        case = Case(kind, method, model, head_of(model), inputs, lambda name: vit() if name == "vit" else make(name))
        shell, live = case.attach()
        moving = {name for name, (role, _) in method.entries(live).items() if role not in STILL}
        values = shaken(case.values(live, shell.config), moving, seed=n)
        case.write(live, values)
        extra = {f"in.{key}": value for key, value in inputs.items()} | {"out": case.logits(live).contiguous()}
        save_file({name: v.contiguous() for name, v in values.items()} | extra, tmp_path / f"{n}.safetensors")
        head = case.head
        jobs.append({"n": n, "model": model, "method": describe(method), "head": head.kind, "labels": list(head.labels)})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, __file__, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


def dense4(model: nn.Module) -> nn.Module:
    """The blocks' linear layers in nf4."""
    import bitsandbytes as bnb

    for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and any(c.isdigit() for c in name)]:
        parent, _, leaf = name.rpartition(".")
        small = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
        )
        small.support_avx512bf16_for_cpu = False
        small.load_state_dict(module.state_dict())
        setattr(model.get_submodule(parent), leaf, small.to("cpu"))
    return model


NARROW: dict[str, Callable[[nn.Module], nn.Module]] = {"nf4": dense4, "bf16": lambda model: model.to(torch.bfloat16)}
KEPT: dict[tuple[str, str], nn.Module] = {}


@pytest.mark.parametrize("quantization", sorted(NARROW))
@each
def test_trains_on_the_bases_that_it_names(case, quantization):
    """One model of each precision for all methods: what one left behind would show in the next."""
    spec = SPECS[case.kind]
    if quantization not in spec.bases:
        with pytest.raises(AdapterError, match=f"{case.kind}: does not train on a base with quantization '{quantization}'"):
            check_base(case.kind, spec, quantization)
        return
    model = KEPT.get((case.model, quantization)) or NARROW[quantization](case.make(case.model))
    if case.head.kind == "lm":
        KEPT[case.model, quantization] = model
    inputs = {name: v.to(torch.bfloat16) if v.is_floating_point() and quantization == "bf16" else v for name, v in case.inputs.items()}
    with torch.no_grad():
        before = model.eval()(**inputs).logits
    live = case.method.attach(model, case.head)
    moving = {name for name, (role, _) in case.method.entries(live).items() if role not in STILL}
    case.write(live, shaken(case.values(live, model.config), moving))
    live.train()(**inputs).logits.float().square().sum().backward()
    trained = {name: p for name, (_, p) in case.method.entries(live).items() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert [name for name, p in trained.items() if p.grad is None or not bool(p.grad.isfinite().all())] == []
    assert any(p.grad.any() for p in trained.values())
    case.method.detach(live)
    if case.head.kind == "lm":
        with torch.no_grad():
            assert torch.equal(model.eval()(**inputs).logits, before)


@each
def test_a_base_without_weights_gives_the_same_layout_or_is_refused(case):
    """A coordinator plans with shapes alone; what must read weights says so."""

    def layout(live):
        return Layout.of([Entry(role, name, tuple(p.shape)) for name, (role, p) in case.method.entries(live).items()])

    meta = case.make(case.model).to("meta")
    if case.kind in READS_WEIGHTS:
        with pytest.raises(AdapterError, match=f"{case.kind}: .*use load_base"):
            case.method.attach(meta, case.head)
        return
    live = case.method.attach(meta, case.head)
    assert layout(live) == layout(case.attach()[1])


@pytest.mark.parametrize("kind", KINDS)
def test_described_and_built_again(kind):
    method = build(METHODS, {"kind": kind, **SMALL.get(kind, {})}, "method")
    table = describe(method)
    assert json.loads(json.dumps(table)) == table
    assert build(METHODS, table, "method") == method
