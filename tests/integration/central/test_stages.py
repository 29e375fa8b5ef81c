"""One rank is the local engine; two ranks in any stage are one, and hold what was estimated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.integration.central.jobs import SINGLE
from tests.integration.central.looking import assert_close, losses, values

from fedpeft.adapters import attach
from fedpeft.central.estimate import estimated, plan_of
from fedpeft.central.job import prepare
from fedpeft.central.joint import JointTask
from fedpeft.central.zero import zero_of
from fedpeft.training.config import load_central

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1300)]


def test_one_rank_is_the_local_engine_step_for_step(folder, found):
    from fedpeft.bases import load_base
    from fedpeft.training.loop import train
    from fedpeft.training.settings import TrainJob

    config = load_central(folder / "job.toml", SINGLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ready = prepare(config, {})
    pool, adapter = ready.pool, ready.adapters["animals"]
    mixed = JointTask("pair", pool, {"animals": 1.0}, config.training.accumulate)

    class Same:
        """The generation task on the same batches."""

        name = "animals"

        def batches(self, data, size, seed, epoch):
            return (one.part(0, 1).batch for one in mixed.batches(data, size, seed, epoch))

        def loss(self, model, batch):
            return config.tasks["animals"].task.loss(model, batch)

    seen: list[float] = []
    base = load_base(config.base, "cpu")
    with attach(base, adapter.spec) as live:
        live.load(adapter.tensors)
        job = TrainJob(adapter.spec.layout.roles, config.seed, None, lambda _step, loss: seen.append(loss))
        train(live, Same(), pool.data[0], config.training, job)
        ours = live.read().flat
    theirs = losses(found["1.0"]["single"])
    assert len(theirs) == 20
    np.testing.assert_allclose(theirs, seen, atol=1e-6, rtol=1e-6)
    assert_close({"value": values(folder, "single1")["animals|value"]}, {"value": ours}, 1e-4)


def assert_stage(folder: Path, found: dict[str, dict], stage: str, worlds: tuple[str, ...]) -> None:
    """Losses and adapters of ``stage`` are those of stage 0 on one rank."""
    for world in worlds:
        for key in ("all", "animals", "colours"):
            wanted = losses(found["1.0"]["stage0"], key)
            np.testing.assert_allclose(losses(found[world][f"stage{stage}"], key), wanted, atol=2e-6, rtol=2e-6)
        assert_close(values(folder, f"{'one' if world == '1.0' else 'two'}{stage}"), values(folder, "one0"), 1e-4)


def assert_held(folder: Path, found: dict[str, dict], stage: str, worlds: tuple[str, ...]) -> None:
    """Each rank holds the moments and the part of the base that were estimated."""
    config = load_central(folder / "job.toml", {"deepspeed.stage": stage})
    for world in worlds:
        size = int(world[0])
        estimate, held = estimated(config, size, "cpu"), found[world][f"stage{stage}"]["held"]
        assert plan_of(estimate, zero_of(config, size)).device["moments"] == held["moments"]
        whole = estimate.weights.part(size if stage == "3" else 1, 0) - estimate.weights.fixed
        assert whole == held["base"]


def test_stage_3_on_two_ranks_is_stage_0_on_one(folder, found):
    assert_stage(folder, found, "3", ("2.0", "2.1"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", "0123")
def test_stages_and_numbers_of_ranks_do_not_matter(folder, more, stage):
    assert_stage(folder, more, stage, ("1.0", "2.0", "2.1"))


def test_a_rank_holds_the_moments_and_the_part_of_the_base_that_were_estimated(folder, found):
    assert_held(folder, found, "0", ("1.0",))
    assert_held(folder, found, "3", ("2.0", "2.1"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", "0123")
def test_what_is_held_was_estimated_in_every_stage(folder, more, stage):
    assert_held(folder, more, stage, ("1.0", "2.0", "2.1"))


@pytest.mark.slow
def test_optimizer_states_in_host_memory_change_nothing(folder, more):
    np.testing.assert_allclose(losses(more["2.0"]["offloaded"]), losses(more["1.0"]["stage0"]), atol=2e-6, rtol=2e-6)
    assert_close(values(folder, "offloaded2"), values(folder, "one0"), 1e-4)
