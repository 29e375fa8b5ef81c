"""A small site on a small encoder: rows on disk, plans as a coordinator would send them."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedpeft import config
from fedpeft.adapters import AdapterSpec, initial, make_spec
from fedpeft.bases import Base, BaseSpec, load_base, resolve, resolve_model
from fedpeft.methods import METHODS
from fedpeft.schemes import SCHEMES
from fedpeft.tasks import Classification
from fedpeft.tensors import Tensors
from fedpeft.training import TrainSettings
from fedpeft.wire import Envelope, flat
from fedpeft.wire.v1.federation_pb2 import RoundPlan, RoundReply, TaskPlan, TaskResult
from fedpeft_client.config import SiteConfig, load_site
from fedpeft_client.worker import Worker

SETTINGS = TrainSettings(steps=2, batch_size=2, lr=1e-3, save_every=1)
LABELS = ("animal", "tool")
WORDS = {"animal": ("cat", "horse", "sparrow", "whale", "fox"), "tool": ("hammer", "saw", "drill", "pliers", "chisel")}
FORMS = ("the {} is in the yard", "I saw a {} today", "a picture of a {}", "have you heard of the {}?", "my {} is old")


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    pick = random.Random(seed)
    kinds = [LABELS[number % 2] for number in range(count)]
    return [
        {"text": pick.choice(FORMS).format(pick.choice(WORDS[kind])), "label": kind, "split": "test" if number % 4 > 1 else "train"}
        for number, kind in enumerate(kinds)
    ]


@pytest.fixture(scope="module", autouse=True)
def packaged_encoder(small_encoder: Path) -> Iterator[Path]:
    """Its folder; here ``minilm`` is the small encoder: what a site does is the same on any base."""
    packaged = resolve_model("minilm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "_package_folder", lambda _alias: small_encoder)
        yield packaged


@pytest.fixture(scope="session")
def base(small_encoder: Path) -> Base:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "_package_folder", lambda _alias: small_encoder)
        return load_base(BaseSpec("minilm"), "cpu")


@pytest.fixture
def site_file(tmp_path: Path) -> Path:
    """A site.toml with two tasks of 12 training rows each."""
    for task in ("kinds", "more"):
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows(24, len(task)))))
    path = tmp_path / "site.toml"
    path.write_text(
        'name = "site-a"\nstate = "state"\ndevice = "cpu"\nthreads = 1\n'
        '[data.kinds]\npath = "kinds.jsonl"\n[data.more]\npath = "more.jsonl"\n'
    )
    return path


@pytest.fixture
def site(site_file: Path) -> SiteConfig:
    return load_site(site_file)


@pytest.fixture
def make_worker(base: Base) -> Callable[[SiteConfig], Worker]:
    """Workers that share the session's base instead of loading their own."""

    def make(site: SiteConfig) -> Worker:
        worker = Worker(site)
        worker.__dict__["base"] = base
        return worker

    return make


@dataclasses.dataclass(frozen=True)
class Plans:
    """What a coordinator sends: `of` builds one task's plan, `train` and `evaluate` the messages."""

    base: Base

    @cache  # noqa: B019 - one instance for all tests
    def start(self, task: str = "kinds", **method: Any) -> Tensors:
        return initial(self.base, self.spec(task, **method), seed=1).tensors

    @cache  # noqa: B019 - one instance for all tests
    def spec(self, task: str = "kinds", **method: Any) -> AdapterSpec:
        built = config.build(METHODS, {"kind": "lora", "r": 4, **method}, "method")
        return make_spec(task, self.base, built, Classification(task, LABELS).head)

    def of(self, task: str = "kinds", method: dict[str, Any] | None = None, number: int = 1, **changes: Any) -> TaskPlan:
        spec, scheme = self.spec(task, **(method or {})), config.build(SCHEMES, changes.pop("scheme", "alternating"), "scheme")
        settings = dataclasses.replace(SETTINGS, **changes.pop("settings", {}))
        fields: dict[str, Any] = {
            "task": task,
            "task_json": json.dumps(config.describe(Classification(task, LABELS))),
            "spec_json": json.dumps(spec.to_json()),
            "scheme_json": json.dumps(config.describe(scheme)),
            "phase": scheme.phase(number, spec.layout).name,
            "roles": sorted(scheme.phase(number, spec.layout).roles),
            "adapter_digest": self.start(task, **(method or {})).digest,
            "settings_json": json.dumps(dataclasses.asdict(settings)),
            "seed": 7,
            "weight_cap": 24,
            "grid_sites": 3,
            "grid_reach": 2.0,
            "cohort": 3,
            "task_round": number,
            "counted_round": number - 1,
        }
        return TaskPlan(**{**fields, **changes})

    def message(self, *plans: TaskPlan, kind: str = "train", arrays: dict[str, Tensors] | None = None, number: int = 1) -> Envelope:
        values = arrays if arrays is not None else {plan.task: self.start(plan.task) for plan in plans}
        packed = {task: flat.pack(tensors.layout.fingerprint, tensors.flat) for task, tensors in values.items()}
        return Envelope.of(kind, RoundPlan(federation="f", run="r", round=number, tasks=plans), packed)

    @staticmethod
    def results(reply: Envelope) -> dict[str, TaskResult]:
        return {result.task: result for result in reply.open(RoundReply).results}


@pytest.fixture(scope="session")
def plans(base: Base) -> Plans:
    return Plans(base)
