"""Estimates against what was measured: an H100's peaks, bytes of real bases; and what advice must hold whatever the sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.bases import BaseSpec, load_base, outline_base
from fedpeft.central.estimate import Room, advise, estimated, plan_of, plans
from fedpeft.central.estimate.plans import width_of
from fedpeft.central.estimate.states import moment_bytes, shares
from fedpeft.central.estimate.weights import weights_of
from fedpeft.cli.main import run
from fedpeft.training.config import CentralConfig
from fedpeft.training.settings import TrainSettings

GIB = 1 << 30
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 8192}
SHAPES = {
    "7B": LLAMA | {"vocab_size": 32000, "intermediate_size": 11008},
    "8B": LLAMA | {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
}
LEAN = TrainSettings(
    batch_size=1, precision="bf16", checkpoint_activations=True, offload_activations=True, optimizer="adamw8bit", packing=False
)
OPEN = {"offload_activations": False, "checkpoint_activations": False}
MEASURED = {
    ("7B", "all levers"): ({}, 4.64),
    ("7B", "logits kept"): ({"chunked_loss": False}, 4.97),
    ("7B", "states on the device"): ({"offload_activations": False}, 5.09),
    ("7B", "no checkpointing"): (OPEN, 12.73),
    ("7B", "moments of 4 bytes"): ({"optimizer": "adamw"}, 4.86),
    ("7B", "4 rows"): ({"batch_size": 4, "offload_activations": False}, 7.54),
    ("7B", "4 rows, no checkpointing"): ({"batch_size": 4} | OPEN, 37.06),
    ("8B", "all levers"): ({}, 6.41),
    ("8B", "logits kept"): ({"chunked_loss": False}, 8.89),
    ("8B", "states on the device"): ({"offload_activations": False}, 6.86),
    ("8B", "no checkpointing"): (OPEN, 14.90),
    ("8B", "moments of 4 bytes"): ({"optimizer": "adamw"}, 6.64),
    ("8B", "4 rows"): ({"batch_size": 4, "offload_activations": False}, 9.48),
    ("8B", "4 rows, no checkpointing"): ({"batch_size": 4} | OPEN, 43.65),
}
"""Peaks of allocated GiB of `tests.bench.k_memory` on an H100 (tests/bench/RESULTS.md); its engine holds what stage 0 does."""
ALONE = {"zero_optimization": {"stage": 0}}


def job(folder, settings: TrainSettings = LEAN, **base) -> CentralConfig:
    entry = {"kind": "generation", "metrics": ["perplexity"], "data": {"path": "rows.jsonl"}}
    return CentralConfig.model_validate(
        {
            "name": "job",
            "output": "out",
            "base": {"model": str(folder), "quantization": "nf4", "max_tokens": 2048} | base,
            "method": {"kind": "lora", "r": 16, "alpha": 16, "targets": ["all"]},
            "training": settings,
            "tasks": {"only": entry},
        }
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The estimate of each measured shape, from a folder that holds ``config.json`` and nothing else."""
    found = {}
    for name, table in SHAPES.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(table))
        found[name] = (job(folder), estimated(job(folder), 1))
    return found


@pytest.mark.parametrize(("shape", "case"), MEASURED)
def test_peaks_are_those_of_an_h100(measured, shape, case):
    changes, peak = MEASURED[shape, case]
    estimate = measured[shape][1]
    rows = changes.get("batch_size", 1)
    changed = replace(estimate, settings=replace(LEAN, **changes), tokens=estimate.tokens * rows, rows=rows)
    assert plan_of(changed, ALONE).allocated / GIB == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("quantization", ["none", "bf16", "fp16", "nf4", "int8", "ao-int8"])
def test_the_bytes_of_a_base_are_those_that_it_has(shared_models, quantization):
    spec = BaseSpec(str(shared_models / "stories260k"), quantization, max_tokens=64)
    model = load_base(spec, "cpu").model
    width = width_of(quantization, "cpu")
    assert weights_of(outline_base(spec), width).whole == bytes_of(model)


def bytes_of(model: torch.nn.Module) -> int:
    """All storages of a model, scales and code books of quantized layers included."""
    tensors = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        tensors += [weight.SCB] if getattr(weight, "SCB", None) is not None else []
        if hasattr(weight, "qdata"):
            tensors = [other for other in tensors if other is not weight] + [weight.qdata, weight.scale]
    return sum(storage.nbytes() for storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values())


GROUPS = st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=60)
@given(GROUPS, st.integers(1, 9), st.sampled_from(["adamw", "adamw8bit", "sgd"]))
def test_shares_cover_what_trains_and_little_more(groups, ranks, optimizer):
    values, tensors = sum(map(sum, groups)), sum(map(len, groups))
    for stage in range(4):
        own = shares(stage, groups, ranks)
        held = sum(map(sum, own)) * (1 if stage == 0 else ranks)
        assert values <= held <= values + ranks * 2 * max(tensors, len(groups))
        assert moment_bytes(own, TrainSettings(optimizer=optimizer)) <= 8 * sum(map(sum, own))


@settings(max_examples=25)
@given(st.integers(4, 90), st.sampled_from([1, 2, 8]), st.booleans())
def test_advice_fits_and_more_memory_never_makes_it_worse(measured, gpu, ranks, lean):
    estimate = replace(measured["8B"][1], ranks=ranks, settings=LEAN if lean else replace(LEAN, **OPEN))
    room, more = Room(gpu * GIB), Room((gpu + 4) * GIB)
    advice, better = advise(estimate, room), advise(estimate, more)
    if advice.plan is None:
        assert "even stage" in advice.reason
        return
    assert room.holds(advice.plan)
    assert better.plan is not None
    assert len(better.changes) <= len(advice.changes)
    changed = replace(estimate, settings=replace(estimate.settings, **advice.changes))
    order = [plan.name for plan in plans(changed)]
    if ranks > 1 and advice.changes == better.changes:
        assert order.index(better.plan.name) <= order.index(advice.plan.name)


def test_moments_of_a_byte_are_advised_where_nothing_else_fits(measured):
    """Of AdamW alone: whoever took SGD did not ask for moments."""
    estimate = replace(measured["8B"][1], ranks=1, settings=replace(LEAN, **OPEN, optimizer="adamw"))
    least = next(plan for plan in plans(replace(estimate, settings=LEAN)) if plan.name == "stage 0")
    room = Room(least.gpu, least.cpu)
    advice = advise(estimate, room)
    assert advice.settings["training.optimizer"] == "adamw8bit"
    assert "optimizer" not in advise(replace(estimate, settings=replace(estimate.settings, optimizer="sgd")), room).changes


def test_stage_3_divides_a_base_and_offloading_empties_the_gpu(measured):
    config, _ = measured["8B"]
    dense = estimated(config.model_copy(update={"base": replace(config.base, quantization="bf16")}), 1)
    of = {plan.name: plan for plan in plans(replace(dense, ranks=8, settings=replace(LEAN, optimizer="adamw")))}
    whole = dense.weights.whole
    assert of["stage 2"].device["base"] == whole
    assert of["stage 3"].device["base"] == pytest.approx(whole / 8, rel=0.01)
    assert "base" not in of["stage 3, params cpu"].device
    assert of["stage 3, params cpu"].host["base"] == of["stage 3"].device["base"]
    assert of["stage 3, optimizer nvme, params nvme"].disk["base"] == of["stage 3"].device["base"]
    assert of["stage 2, optimizer cpu"].host["moments"] == of["stage 2"].device["moments"]


def test_the_command_says_what_to_take(measured, tmp_path, capsys):
    base = measured["8B"][0].base
    text = f"""
name = "job"
output = "out"
base = {{ model = "{base.model}", quantization = "nf4", max_tokens = 2048 }}
method = {{ kind = "lora", r = 16, targets = ["all"] }}
training = {{ batch_size = 4, precision = "bf16" }}
[tasks.only]
kind = "generation"
metrics = ["perplexity"]
data = {{ path = "rows.jsonl" }}
"""
    (tmp_path / "job.toml").write_text(text)
    call = ["central", "estimate", str(tmp_path / "job.toml"), "--ranks", "2", "--gpu-memory", "12"]
    assert run([*call, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["advice"]["settings"]["training.checkpoint_activations"] is True
    assert not said["job"]["fits"]
    assert said["job"]["plan"] == "stage 2"
    assert len(said["plans"]) == 7
    assert run([*call[:-1], "3"]) == 1
    printed = capsys.readouterr().out
    assert "nothing fits: even stage" in printed
    assert "this job: stage 2" in printed
