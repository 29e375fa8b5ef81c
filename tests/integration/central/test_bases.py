"""Central jobs on every kind of base and in every precision, packed or padded."""

from __future__ import annotations

import numpy as np
import pytest
from tests.integration.central.looking import assert_close, losses, values

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1300)]


@pytest.mark.slow
@pytest.mark.parametrize("world", "12")
def test_packed_sequences_train_as_padded_ones_do(folder, more, world):
    np.testing.assert_allclose(losses(more[f"{world}.0"]["padded"]), losses(more["1.0"]["stage0"]), atol=2e-6, rtol=2e-6)
    assert_close(values(folder, f"padded{world}"), values(folder, "one0"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_base_in_half_precision_stays_so_in_stage_3(more, kind):
    one, half = more["2.0"]["stage3"], more["2.0"][kind]
    assert half["held"]["base"] == one["held"]["base"] // 2
    np.testing.assert_allclose(losses(half), losses(one)[:1], rtol=0.02)


@pytest.mark.slow
def test_an_encoder_with_a_head_for_each_task_is_the_same_on_two_ranks_in_stage_3(folder, more):
    for key in ("all", "kind", "size"):
        np.testing.assert_allclose(losses(more["2.0"]["encoder"], key), losses(more["1.0"]["encoder"], key), atol=2e-6, rtol=2e-6)
    assert_close(values(folder, "encoder2"), values(folder, "encoder1"), 1e-4)


@pytest.mark.slow
def test_an_encoder_decoder_is_the_same_on_two_ranks_in_stage_3(folder, more):
    assert losses(more["1.0"]["paired"])[-1] < losses(more["1.0"]["paired"])[0]
    np.testing.assert_allclose(losses(more["2.0"]["paired"]), losses(more["1.0"]["paired"]), rtol=1e-5)
    assert_close(values(folder, "paired2"), values(folder, "paired1"), 1e-3)


@pytest.mark.slow
def test_an_8_bit_base_trains_on_two_ranks_in_stage_3(folder, more):
    one, two = more["1.0"]["int8"], more["2.0"]["int8"]
    assert losses(one)[-1] < losses(one)[0]
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


def test_a_four_bit_base_trains_in_stage_3(found):
    seen = losses(found["2.0"]["nf4.3"])
    assert seen[-1] < 0.5 * seen[0]


@pytest.mark.slow
def test_a_four_bit_base_trains_in_stage_2_as_in_stage_3(folder, more):
    np.testing.assert_allclose(losses(more["2.0"]["nf4.3"]), losses(more["2.0"]["nf4.2"]), atol=2e-5)
    assert_close(values(folder, "nf4-3"), values(folder, "nf4-2"), 1e-3)
