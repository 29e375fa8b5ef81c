"""Methods made of methods on real bases, quantized ones too: attached, trained by the loop, detached without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedpeft.adapters import Adapter, attach, initial, make_spec
from fedpeft.adapters.convert import to_lora
from fedpeft.bases import Base, HeadSpec
from fedpeft.config import build
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS
from fedpeft.tasks import TASKS
from fedpeft.training import TrainJob, TrainSettings, train

Warm = Callable[..., Base]
LABELS = HeadSpec("classification", ("a", "b", "c"))
TABLES: dict[str, Any] = {
    "mam": [{"kind": "prefix", "tokens": 3}, {"kind": "parallel", "dim": 4}],
    "rosa": [{"kind": "lora", "r": 2}, {"kind": "sparse-magnitude", "density": 0.01}],
    "scaled": [{"kind": "lora", "r": 2, "dropout": 0.1}, "ia3", {"kind": "ssf", "targets": ["attention"]}],
    "biased": ["bitfit", {"kind": "lora", "r": 2}],
    "unipelt": {"kind": "unipelt", "r": 2, "tokens": 3, "dim": 4},
    "hydralora": {"kind": "hydralora", "r": 2, "experts": 3},
    "molora": {"kind": "molora", "r": 2, "experts": 3},
    "adapterfusion": {"kind": "adapterfusion", "dim": 4},
}
ROWS = [{"text": " ".join(f"w{(7 * row + 3 * place) % 60}" for place in range(2 + row % 5)), "label": "abc"[row % 3]} for row in range(12)]


PAIRS = [
    (name, quantization)
    for name in TABLES
    for quantization in ("none", "nf4", "int8")
    if quantization == "none" or name in ("rosa", "scaled") or (name, quantization) == ("unipelt", "nf4")
]


@pytest.mark.parametrize(("name", "quantization"), PAIRS)
def test_the_loop_trains_what_a_method_of_methods_holds(warm: Warm, name: str, quantization: str, inputs: dict[str, Any]) -> None:
    base = warm("encoder", quantization)
    before = {key: p.detach().clone() for key, p in base.model.named_parameters()}
    plain = base.embed(["w1 w2 w3"])
    spec = make_spec("t", base, build(METHODS, TABLES[name], "method"), LABELS)
    start = initial(base, spec, 1)
    task = build(TASKS, {"kind": "classification", "name": "t", "labels": ["a", "b", "c"]}, "task")
    frozen = spec.layout.roles & {"index", "expert"}
    with attach(base, spec) as live:
        live.load(start.tensors)
        result = train(live, task, task.encode(ROWS, base), TrainSettings(steps=3, batch_size=4), TrainJob(spec.layout.roles - frozen, 5))
        after = live.read()
    assert result.steps == 3
    assert after.finite
    still = [
        role for role in sorted(spec.layout.roles) if torch.equal(*(torch.from_numpy(t.pick({role}).flat) for t in (start.tensors, after)))
    ]
    assert set(still) == frozen
    assert all(torch.equal(before[key], p) for key, p in base.model.named_parameters())
    assert (base.embed(["w1 w2 w3"]) == plain).all()


def test_a_hybrid_that_changes_linear_layers_converts_to_a_lora(warm: Warm, shaken: Callable[..., Adapter]) -> None:
    base = warm("causal")
    method = build(METHODS, [{"kind": "lora", "r": 2}, {"kind": "sparse-seed", "density": 0.02}], "method")
    adapter = shaken(make_spec("t", base, method, HeadSpec("lm")))
    whole = to_lora(base, adapter, 64)
    assert whole.weight_error < 1e-5
    assert whole.output_error < 1e-3
    assert to_lora(base, adapter, 2).weight_error > 0.01


def test_a_base_that_one_part_cannot_train_on_is_refused(warm: Warm) -> None:
    base = warm("encoder", "nf4")
    dense = next(kind for kind in ("loha", "lokr") if kind in METHODS)
    with pytest.raises(AdapterError, match="compose: does not train on a base with quantization 'nf4'"):
        make_spec("t", base, build(METHODS, [dense, "houlsby"], "method"), LABELS)


def test_what_peft_cannot_put_around_its_own_layer_leaves_the_base_free(warm: Warm, inputs: dict[str, Any]) -> None:
    base = warm("encoder", "int8")
    with pytest.raises(AdapterError, match="lora: peft cannot put it on"):
        make_spec("t", base, build(METHODS, ["ia3", "lora"], "method"), LABELS)
    spec = make_spec("t", base, build(METHODS, "lora", "method"), LABELS)
    with attach(base, spec) as live, torch.no_grad():
        assert live.model(**inputs).logits.isfinite().all()
