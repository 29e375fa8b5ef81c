"""Fixtures that every test may use: real models and data where they are, one torch thread, a free port."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path

import hypothesis
import pytest

# `make test` says the same of the same code every time; `make fuzz` looks for what nobody has seen.
hypothesis.settings.register_profile("repeat", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True, max_examples=200)
hypothesis.settings.load_profile(os.environ.get("FEDPEFT_HYPOTHESIS", "repeat"))
gc.disable()  # while tests are collected: imports make a million objects and no garbage
os.environ.update(
    FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
)

SHARED = Path(os.environ.get("FEDPEFT_SHARED", Path(__file__).parents[2] / "shared"))


def _shared(part: str) -> Path:
    folder = SHARED / part
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set FEDPEFT_SHARED to a folder with data/ and models/")
    return folder


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of small real causal models (stories260k, tinystories-656k, babyllama105)."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real multi-task JSONL files."""
    return _shared("data")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was imported need not be walked again and again
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
