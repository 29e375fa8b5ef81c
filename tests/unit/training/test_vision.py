"""Vision encoders in the loop: levers change nothing, what stops goes on to the bit, examples are private apart, and digits are learnt."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from fedpeft.adapters import attach, initial, make_spec
from fedpeft.bases import BaseSpec, load_base
from fedpeft.errors import PrivacyError, UpdateError
from fedpeft.methods import METHODS, Lora
from fedpeft.tasks import Classification, Source, read_rows
from fedpeft.training import TrainJob, TrainSettings, dp_check, evaluate, train
from fedpeft.training.dp_recorder import Recorder

TASK = Classification("digits", tuple("0123456789"))
KINDS = ("ViT", "Beit", "Swin", "ConvNext")


@pytest.fixture(scope="module", params=KINDS)
def base(request, vision_folder):
    return load_base(BaseSpec(str(vision_folder(request.param))), "cpu")


@pytest.fixture(scope="module")
def rows(digits):
    return read_rows(Source(path=str(digits), limit=24))


def fit(base, rows, settings, job=None, dropout=0.0):
    """The values after training from the seed's adapter."""
    spec = make_spec(TASK.name, base, Lora(targets=("all",), dropout=dropout), TASK.head)
    with attach(base, spec) as live:
        live.load(initial(base, spec, 0).tensors)
        train(live, TASK, TASK.encode(rows, base), settings, job or TrainJob(spec.layout.roles, 0))
        return live.flat.clone(), evaluate(live, TASK, TASK.encode(rows, base))


def test_checkpointed_blocks_change_nothing(base, rows):
    plain, counters = fit(base, rows, TrainSettings(steps=4, batch_size=8, lr=1e-2))
    assert torch.isfinite(plain).all()
    assert counters["examples"] == (24.0,)
    if base.model.supports_gradient_checkpointing:
        found, _ = fit(base, rows, TrainSettings(steps=4, batch_size=8, lr=1e-2, checkpoint_activations=True))
    else:  # ConvNeXt
        with pytest.raises(UpdateError, match="cannot checkpoint activations"):
            fit(base, rows, TrainSettings(steps=4, checkpoint_activations=True))
        found = plain
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)


def test_what_stops_goes_on_to_the_bit(vision_folder, rows, tmp_path):
    base = load_base(BaseSpec(str(vision_folder("ViT"))), "cpu")
    roles = make_spec(TASK.name, base, Lora(targets=("all",)), TASK.head).layout.roles
    whole, _ = fit(base, rows, TrainSettings(steps=8, batch_size=5, lr=1e-2), dropout=0.1)
    fit(base, rows, TrainSettings(steps=5, batch_size=5, lr=1e-2, save_every=1), TrainJob(roles, 0, tmp_path), 0.1)
    again, _ = fit(base, rows, TrainSettings(steps=8, batch_size=5, lr=1e-2, save_every=1), TrainJob(roles, 0, tmp_path), 0.1)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("kind", ["lora", "ia3", "bottleneck", "bitfit"])
def test_gradients_of_examples_are_those_of_each_alone_or_refused(vision_folder, rows, kind):
    base = load_base(BaseSpec(str(vision_folder("ViT"))), "cpu")
    spec = make_spec(TASK.name, base, METHODS[kind](), TASK.head)
    first = initial(base, spec, 0)
    with attach(base, spec) as live:
        live.load(first.tensors)
        live.train_roles(spec.layout.roles)
        refused = pytest.raises(PrivacyError, match=r"patch_embeddings\.projection\.bias in a way whose gradient per example is not known")
        with refused if kind == "bitfit" else nullcontext():
            dp_check.check(Recorder(live.parameters, kind), live, TASK, TASK.encode(rows, base))  # raises where they are not


@pytest.mark.slow
def test_real_digits_are_learnt_by_an_untrained_trunk_and_not_by_its_head(vision_folder, digits):
    base = load_base(BaseSpec(str(vision_folder("ViT"))), "cpu")
    data = {split: TASK.encode(read_rows(Source(path=str(digits)), split), base) for split in ("train", "test")}
    found = {}
    for name in ("all", "head"):
        spec = make_spec(TASK.name, base, Lora(targets=("all",)), TASK.head)
        with attach(base, spec) as live:
            live.load(initial(base, spec, 0).tensors)
            roles = spec.layout.roles if name == "all" else frozenset({"head"})
            train(live, TASK, data["train"], TrainSettings(steps=300, batch_size=32, lr=3e-3), TrainJob(roles, 0))
            found[name] = TASK.scores(evaluate(live, TASK, data["test"]))["accuracy"]
    assert found["all"] > 0.5  # 0.1 is chance
    assert found["head"] < 0.3
