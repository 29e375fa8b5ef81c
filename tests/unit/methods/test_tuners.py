"""The tuners of peft: their starts, what stock peft loads, what a batch may mix, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedpeft.adapters.making import layout_of, require_base
from fedpeft.config import build
from fedpeft.errors import AdapterError, UpdateError
from fedpeft.methods import METHODS, SPECS
from fedpeft.methods.attached import ADAPTER
from fedpeft.methods.tuners import REFUSED, ROWS, TUNERS
from fedpeft.methods.tuners.tree import Tree
from fedpeft.schemes import SCHEMES
from fedpeft.tensors import Entry, Layout

SMALL = {"trainable-tokens": {"tokens": [5, 9]}, "adamss": {"r": 8}}
SMALLER_START = {"cartridge"}
"""Ours starts as a prefix does; peft's unit normal drowns what the model was told."""
PORTABLE = sorted(kind for kind, row in ROWS.items() if row.portable)
LINEAR = sorted(kind for kind, row in ROWS.items() if row.place == "linear" and kind not in ("poly",))

pytestmark = pytest.mark.filterwarnings("ignore")


def method_of(kind):
    return build(METHODS, {"kind": kind, **SMALL.get(kind, {})}, "method")


def shake(method, live, by=0.1):
    torch.manual_seed(3)
    for role, p in method.entries(live).values():
        p.data = p.data + by * torch.randn_like(p) if role != "head" else p.data


@pytest.mark.parametrize("kind", sorted(TUNERS))
def test_round_0_is_drawn_as_peft_draws_it(kind, make, head_of):
    method, model = method_of(kind), make("llama")
    live = method.attach(model, head_of("llama"))
    for role, start in ROWS[kind].start.items():
        own = [(name, p.detach()) for name, (r, p) in method.entries(live).items() if r == role]
        ours = np.concatenate([start.draw(Entry(role, n, tuple(p.shape)), np.random.default_rng(0)).ravel() for n, p in own] or [[0.0]])
        theirs = torch.cat([p.flatten() for _, p in own] or [torch.zeros(1)]).numpy()
        if start.how == "constant":
            assert (ours == theirs).all()
        elif kind not in SMALLER_START:
            assert ours.std() == pytest.approx(theirs.std(), rel=0.35)
            assert abs(ours).max() == pytest.approx(abs(theirs).max(), rel=0.6)


@pytest.mark.parametrize("kind", sorted(TUNERS))
def test_stock_peft_loads_what_we_save_or_refuses_it(kind, make, head_of, rows, tmp_path):
    from peft import PeftModel

    method = method_of(kind)
    live = method.attach(make("llama"), head_of("llama"))
    shake(method, live)
    layout = Layout.of([Entry(role, name, tuple(p.shape)) for name, (role, p) in method.entries(live).items()])
    (tmp_path / "adapter_config.json").write_text(json.dumps(method.peft_config("llama", head_of("llama"), layout)))
    save_file({name: p.detach().contiguous() for name, (_, p) in method.entries(live).items()}, tmp_path / "adapter_model.safetensors")
    if kind not in PORTABLE:
        with pytest.raises((ValueError, KeyError)):
            PeftModel.from_pretrained(make("llama"), tmp_path)
        return
    theirs = PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    with torch.no_grad():
        want, got = theirs(**rows).logits, live.eval()(**rows).logits
    assert torch.allclose(got, want[:, -got.shape[1] :], atol=1e-5)


@pytest.mark.parametrize("kind", sorted(TUNERS))
def test_schemes_call_exact_what_the_facts_call_exact(kind, make, head_of):
    method, spec = method_of(kind), SPECS[kind]
    layout = layout_of(method, method.attach(make("llama"), head_of("llama")))
    exact = {name for name in ("alternating", "ffa", "cartesian") if takes(SCHEMES[name](), layout) and SCHEMES[name]().exact(layout)}
    if spec.average == "linear":
        assert SCHEMES["fedavg"]().exact(layout)
    elif spec.average != "prompt":  # a prompt is no product, and its outputs are no linear function of it
        assert not SCHEMES["fedavg"]().exact(layout)
        assert exact == set(spec.exact_with)


def takes(scheme, layout):
    try:
        scheme.check(layout)
    except UpdateError:
        return False
    return True


def peft_pair(kind, make):
    """A stock peft model with two shaken adapters, none of our own code in it."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    row, method = ROWS[kind], method_of(kind)
    arguments = method._arguments() | {"target_modules": ["embed_tokens"] if row.place == "embeddings" else ["q_proj", "v_proj"]}
    make_config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(row.peft)]
    model = get_peft_model(make("llama"), make_config(**arguments), adapter_name="one")
    model.add_adapter("two", make_config(**arguments))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.is_floating_point() and (".one" in name or ".two" in name):
            p.data = p.data + 0.2 * torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize("kind", [*LINEAR, "trainable-tokens"])
def test_a_batch_mixes_adapters_only_where_declared(kind, make):
    """peft answers silently with the active adapter alone for most tuners; only those that do not may be mixed."""
    ids = torch.tensor([[5, 9, 12], [9, 5, 12]])
    try:
        model = peft_pair(kind, make)
    except (ValueError, TypeError, AttributeError, KeyError):
        assert not SPECS[kind].mixed_batch
        return
    with torch.no_grad():
        alone = []
        for row, name in enumerate(("one", "two")):
            model.set_adapter(name)
            alone.append(model(input_ids=ids).logits[row])
        model.set_adapter("one")
        try:
            mixed = model(input_ids=ids, adapter_names=["one", "two"]).logits
            right = torch.allclose(mixed, torch.stack(alone), atol=1e-5)
        except (ValueError, TypeError, NotImplementedError, RuntimeError):
            right = False
    assert not torch.allclose(alone[1], model(input_ids=ids).logits[1], atol=1e-4)
    assert right == SPECS[kind].mixed_batch


@pytest.mark.parametrize("name", ["0", "q_proj"])
def test_an_adapters_name_that_is_a_modules_name_loses_tensors_in_peft(name, make):
    """Why the name inside peft is fixed here."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    def count(called):
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(make("llama"), config, adapter_name="keep")
        model.add_adapter(called, config)
        return len(get_peft_model_state_dict(model, adapter_name="keep"))

    assert count(name) < count(ADAPTER) == 8
    assert not ADAPTER.isdigit()


def test_an_adapter_without_tensors_is_refused():
    empty = SimpleNamespace(entries=lambda model: {})
    with pytest.raises(AdapterError, match="trains no tensor"):
        layout_of(empty, torch.nn.Linear(1, 1))


@pytest.mark.parametrize("kind", sorted(set(TUNERS) - {k for k, s in SPECS.items() if "nf4" in s.bases}))
def test_a_base_on_which_it_would_fail_silently_is_refused_by_name(kind):
    base = SimpleNamespace(spec=SimpleNamespace(quantization="nf4"))
    with pytest.raises(AdapterError, match=f"{kind}: .*'nf4'.*use lora"):
        require_base(method_of(kind), base)
    require_base(METHODS["lora"](), base)


REFUSALS = {
    ("osf", "gpt2"): "found nothing to train",
    ("miss", "gpt2"): "Conv1D",
    ("llama-adapter", "bert"): "not for bert",
    ("shadow", "t5"): "two stacks of blocks",
    ("p-tuning", "llama-classifier"): "last token",
    ("multitask-prompt", "t5"): "encoder-decoder",
    ("cartridge", "distilbert"): "past_key_values",
    ("beft", "gpt2"): "Conv1D",
}


@pytest.mark.parametrize(("kind", "name"), sorted(REFUSALS))
def test_what_cannot_work_is_refused_and_leaves_nothing_behind(kind, name, make, head_of):
    model = make(name)
    modules = {key: id(module) for key, module in model.named_modules()}
    with pytest.raises(AdapterError, match=REFUSALS[kind, name]):
        method_of(kind).attach(model, head_of(name))
    assert modules == {key: id(module) for key, module in model.named_modules()}
    lora = METHODS["lora"]()
    lora.detach(lora.attach(model, head_of(name)))


@pytest.mark.parametrize(
    ("kind", "table", "says"),
    [("road", {"group": 64}, "divisible"), ("c3a", {"block": 48}, "block"), ("vera", {"targets": ["nowhere"]}, "selects no")],
)
def test_settings_that_do_not_fit_the_model_are_refused_at_attach(kind, table, says, make, head_of):
    with pytest.raises(AdapterError, match=says):
        build(METHODS, {"kind": kind, **table}, "method").attach(make("llama"), head_of("llama"))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [("vera", "r", 0), ("hira", "dropout", 1.0), ("vera", "alpha", 1), ("cpt", "tokens", []), ("deft", "decomposition", "svd")],
)
def test_settings_out_of_range_are_named(kind, key, value):
    with pytest.raises(ValueError, match=key):
        build(METHODS, {"kind": kind, key: value}, "method")


@pytest.mark.parametrize("kind", ["vera", "oft", "p-tuning", "shadow", "lily"])
def test_frozen_parts_do_not_follow_torchs_generator(kind, make, head_of, rows):
    method, found = method_of(kind), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        live = method.attach(make("llama"), head_of("llama")).eval()
        shake(method, live)
        with torch.no_grad():
            found.append(live(**rows).logits)
    assert torch.equal(*found)


def test_a_tree_is_put_back_whatever_was_swapped():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    first, weight, data = model[0], model[0].weight, model[0].weight.data
    hook = first.register_forward_hook(lambda *_: None)
    tree = Tree.of(model)
    model[0] = torch.nn.Identity()
    first.weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.data = torch.zeros(2, 2)
    first.forward = lambda x: x
    first.extra, first._buffers["more"] = 1, torch.zeros(1)
    first.register_forward_pre_hook(lambda *_: None)
    tree.restore()
    assert model[0] is first
    assert first.weight is weight
    assert weight.data_ptr() == data.data_ptr()
    assert "forward" not in vars(first)
    assert not hasattr(first, "extra")
    assert not first._buffers
    assert not first._forward_pre_hooks
    assert len(first._forward_hooks) == 1
    hook.remove()
    assert not first._forward_hooks


def test_every_type_of_the_installed_peft_is_here_or_refused():
    """A lift of peft's bound shows here what it brings."""
    from peft.utils import PeftType

    own = {"LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING", "XLORA"}
    here = {row.peft for row in ROWS.values()} | own | {kind.upper().replace("-", "_") for kind in REFUSED}
    assert {kind.value for kind in PeftType} <= here
