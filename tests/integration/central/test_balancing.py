"""Tasks that weigh against each other, end early or share: the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.integration.central.looking import assert_close, assert_same, losses, values

from fedpeft.central.job import prepare
from fedpeft.tensors import Tensors
from fedpeft.training import checkpoint
from fedpeft.training.config import load_central

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1300)]


def test_balancing_is_the_same_on_any_number_of_ranks_and_after_a_resumption(folder, found):
    assert_balanced(folder, found, "uncertainty")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coba", "pcgrad"])
def test_every_balance_is_the_same_on_any_number_of_ranks_and_after_a_resumption(folder, more, kind):
    assert_balanced(folder, more, kind)


def assert_balanced(folder: Path, found: dict[str, dict], kind: str) -> None:
    one = found["1.0"][kind]
    for world in ("2.0", "2.1"):
        for key in one["losses"][-1]:
            np.testing.assert_allclose(losses(found[world][kind], key), losses(one, key), rtol=5e-4, atol=1e-4, err_msg=key)
    assert_close(values(folder, f"{kind}2"), values(folder, f"{kind}1"), 1e-3)
    assert found["1.0"][f"{kind}-resumed"]["losses"] == one["losses"][3:]
    assert_same(values(folder, f"{kind}-cut1"), values(folder, f"{kind}1"))
    told = {"uncertainty": "weight/animals", "coba": "held/colours", "pcgrad": "cosine/animals|colours"}[kind]
    assert len(set(losses(one, told))) > 2
    assert kind != "pcgrad" or losses(one, told).min() < 0


@pytest.mark.slow
def test_a_task_that_ended_early_rests_and_the_others_take_its_share(folder, more):
    for world, size in (("1.0", 1), ("2.0", 2)):
        steps = more[world]["ending"]["losses"]
        ended = next(number for number, step in enumerate(steps) if "animals" not in step)
        assert all("animals" not in step and "colours" in step for step in steps[ended:])
        assert ended < len(steps) < 30, "the job is over when all tasks have ended"
        judged = [(step["held/animals/perplexity"], step["held/animals"]) for step in steps]
        assert [one for one, _ in judged] == pytest.approx([np.exp(loss) for _, loss in judged], rel=1e-4)
        whole, cut = values(folder, f"ending{size}"), values(folder, f"ending-cut{size}")
        assert (whole["animals|value"] == cut["animals|value"]).all()
        assert (whole["colours|value"] != cut["colours|value"]).any()
        state = checkpoint.read(folder / f"ending{size}" / "checkpoint")
        assert state.arrays["(stops)|ended"].tolist() == [ended, len(steps)]
        before = [one for one, _ in judged[:ended]]
        assert min(before[:-2]) < min(before[-2:]) + 0.3, "two looks without a perplexity that is lower by 0.3"
        assert state.tally.examples == 8 * len(steps)


@pytest.mark.slow
def test_a_shared_adapter_trains_beside_each_own(folder, more):
    np.testing.assert_allclose(losses(more["2.0"]["shared"]), losses(more["1.0"]["shared"]), atol=2e-6, rtol=2e-6)
    assert_close(values(folder, "shared2"), values(folder, "shared1"), 1e-4)
    assert "(shared)|value" in values(folder, "shared1")
    assert losses(more["1.0"]["shared"])[-1] < losses(more["1.0"]["shared"])[0]


@pytest.mark.slow
def test_a_router_over_all_tasks_rows_is_trained_published_and_read_again(folder, more, tmp_path):
    from fedpeft.central.job import trained
    from fedpeft.central.publish import publish
    from fedpeft.registry import Registry

    one = more["1.0"]["hydra"]
    for key in ("all", "cosine/animals|colours"):
        np.testing.assert_allclose(losses(more["2.0"]["hydra"], key), losses(one, key), rtol=5e-4, atol=1e-4)
    method = '{kind = "hydralora", r = 2, experts = 2, targets = ["all"]}'
    change = {"shared": "true", "shared_method": method, "registry": str(tmp_path), "output": str(folder / "hydra1")}
    config = load_central(folder / "job.toml", change)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        every = prepare(config, {}).every
    publish(config, trained(config, every), {})
    again = Registry(tmp_path).load("pair.shared").tensors.named()
    held = Tensors(every["(shared)"].spec.layout, values(folder, "hydra1")["(shared)|value"]).named()
    assert all((again[name] == held[name]).all() for name in held)
    routers = [name for name in again if name.endswith("hydralora.router")]
    assert routers
    assert all((again[name] != every["(shared)"].tensors.named()[name]).any() for name in routers)
