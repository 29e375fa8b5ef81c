"""Loss scaling and moments of a byte: the same on all ranks, and after a resumption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.integration.central.looking import assert_close, assert_same, losses, values

from fedpeft.central.estimate import estimated, plan_of
from fedpeft.central.zero import zero_of
from fedpeft.training import checkpoint
from fedpeft.training.config import load_central

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1300)]


def assert_left_out(folder: Path, found: dict[str, dict], stage: str, worlds: tuple[str, ...]) -> None:
    """The step that overflows on the last rank is left out on all of them, and nothing else is."""
    one = found["1.0"]["scaled0"]
    for world in worlds:
        again = found[world][f"scaled{stage}"]
        np.testing.assert_allclose(losses(again), losses(one), atol=2e-6, rtol=2e-6)
        assert losses(again, "loss scale").tolist() == [2.0**16] + [2.0**15] * 3
        assert_close(values(folder, f"scaled{world[0]}-{stage}"), values(folder, "scaled1-0"), 1e-4)


def assert_went_on(folder: Path, found: dict[str, dict], stage: str) -> None:
    """A job that was cut after a step left out ends at the same bits."""
    again = found["1.0"][f"scaled{stage}-resumed"]
    assert losses(again).tolist() == losses(found["1.0"][f"scaled{stage}"])[3:].tolist()
    assert_same(values(folder, f"scaled1-{stage}-cut"), values(folder, f"scaled1-{stage}"))


def test_a_step_that_overflows_on_one_rank_is_left_out_on_all(folder, found):
    one, plain = losses(found["1.0"]["scaled0"]), losses(found["1.0"]["stage0"])
    np.testing.assert_allclose(one[:2], plain[:2], atol=2e-6)
    assert abs(one[2] - plain[2]) > 0.01
    assert_left_out(folder, found, "2", ("2.0", "2.1"))


def test_a_job_goes_on_at_the_loss_scale_that_it_had(folder, found):
    assert_went_on(folder, found, "0")
    held = checkpoint.read(folder / "scaled1-0-cut" / "checkpoint")
    assert held is not None
    assert (held.tally.skipped, held.arrays["(scale)"].tolist(), int(held.arrays["moved"])) == (1, [2.0**15, 2.0], 3)


@pytest.mark.slow
def test_loss_scaling_is_the_same_in_every_stage(folder, more):
    assert_left_out(folder, more, "1", ("1.0",))
    for stage in "03":
        assert_left_out(folder, more, stage, ("2.0", "2.1"))
    assert_went_on(folder, more, "3")


def assert_bytes_held(folder: Path, found: dict[str, dict], stage: str, worlds: tuple[str, ...]) -> None:
    table = {"deepspeed.stage": stage, "training.optimizer": "adamw8bit", "method": '{ kind = "lora", r = 16, targets = ["all"] }'}
    config = load_central(folder / "job.toml", table)
    for world in worlds:
        ranks, held = int(world[0]), found[world]["bytes"]["held"]["moments"]
        assert plan_of(estimated(config, ranks, "cpu"), zero_of(config, ranks)).device["moments"] == held


def test_moments_of_a_byte_go_on_to_the_bit_on_the_same_ranks_and_stage(folder, found):
    assert losses(found["2.0"]["bytes-resumed"]).tolist() == losses(found["2.0"]["bytes"])[2:].tolist()
    assert_same(values(folder, "bytes2-cut"), values(folder, "bytes2"))
    assert_bytes_held(folder, found, "2", ("2.0", "2.1"))


@pytest.mark.slow
def test_moments_of_a_byte_train_nearly_as_those_of_four_do_on_any_ranks_and_stage(folder, more):
    floats = more["1.0"]["floats"]
    assert_bytes_held(folder, more, "1", ("1.0",))
    for world in ("1.0", "2.0", "2.1"):
        np.testing.assert_allclose(losses(more[world]["bytes"]), losses(floats), rtol=2e-3)
        assert more[world]["bytes"]["held"]["moments"] < 0.27 * floats["held"]["moments"] / int(world[0])
    np.testing.assert_allclose(losses(more["1.0"]["bytes-resumed"]), losses(more["1.0"]["bytes"])[2:], rtol=2e-3)
