"""Real small bases and a random encoder, loaded once, and adapters whose every tensor matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import Adapter, initial, make_spec
from fedpeft.bases import Base, BaseSpec, HeadSpec, load_base
from fedpeft.methods import METHODS
from fedpeft.tensors import Tensors

LABELS, LM = HeadSpec("classification", ("yes", "no", "maybe")), HeadSpec("lm")


@pytest.fixture(scope="session")
def bases(shared_models, small_encoder) -> Callable[[str, str], Base]:
    loaded: dict[tuple[str, str], Base] = {}

    def base(name: str, quantization: str = "none") -> Base:
        if (name, quantization) not in loaded:
            model = {"minilm": name, "encoder": str(small_encoder)}.get(name, str(shared_models / name))
            loaded[(name, quantization)] = load_base(BaseSpec(model, quantization, max_tokens=128), "cpu")  # type: ignore[arg-type]
        return loaded[(name, quantization)]

    return base


@pytest.fixture(scope="session")
def made() -> Callable[..., Adapter]:
    """An adapter moved away from its start, with a head of its own where the base is an encoder."""

    def make(base: Base, kind: str = "lora", labels: bool | None = None, **settings: Any) -> Adapter:
        head = LABELS if (base.family == "encoder" if labels is None else labels) else LM
        spec = make_spec("t", base, METHODS[kind](**settings), head)
        start = initial(base, spec, 3).tensors.flat
        noise = np.random.default_rng(0).normal(0, 0.05, spec.layout.size)
        return Adapter(spec, Tensors(spec.layout, (start + noise).astype(np.float32)))

    return make
