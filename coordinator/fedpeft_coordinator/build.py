"""From a federation.toml to what rounds need: layouts and round-0 tensors from the base's architecture, no weights where possible."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from fedpeft.bases import meta_encoder
from fedpeft.bases.base import OWN
from fedpeft.config import build as build_plugin
from fedpeft.config import describe
from fedpeft.errors import BaseError, ConfigError, DataError
from fedpeft.privacy.secagg import enough
from fedpeft.privacy.settings import Distributed
from fedpeft.routing import BINS
from fedpeft.schemes.robust import Buckets
from fedpeft.tensors import Tensors
from fedpeft.training.outline import start_seed
from fedpeft.wire.codecs import as_delta
from fedpeft_coordinator.config import FederationConfig
from fedpeft_coordinator.control.opening import open_registry
from fedpeft_coordinator.fitting import check_fit
from fedpeft_coordinator.private_rules import lengths, settings_of
from fedpeft_coordinator.release import Release
from fedpeft_coordinator.setup import Limits, SecureAggregation, Setup, TaskSetup

if TYPE_CHECKING:
    from fedpeft.adapters import AdapterSpec
    from fedpeft.adapters.starts import Samples
    from fedpeft.bases import Base
    from fedpeft.registry import Registry


@dataclass(frozen=True)
class RegistryPublisher:
    """Publishes to a registry on disk; ``specs`` and ``tasks`` (their tables) by task, whose texts are cut to ``max_tokens``."""

    registry: Registry
    specs: Mapping[str, AdapterSpec]
    tasks: Mapping[str, Mapping[str, Any]]
    scheme: str
    max_tokens: int

    def __call__(self, task: TaskSetup, tensors: Tensors, release: Release) -> str:
        """Publish and return the version's digest. Raises `StorageError`."""
        from fedpeft.adapters import Adapter
        from fedpeft.registry import Manifest

        manifest = Manifest(
            task_settings=self.tasks[task.name],
            quantization=release.kinds,
            max_tokens=self.max_tokens,
            scheme=self.scheme,
            federation=release.federation,
            round=release.round,
            parents=release.parents,
            metrics=release.metrics,
            weight=release.weight,
            examples=release.examples,
            sites=release.sites,
            card=release.card,
        )
        origin = f"{release.origin}/{task.name}"
        return str(self.registry.publish(Adapter(self.specs[task.name], tensors), manifest, origin, release.router).digest)


def build(config: FederationConfig) -> tuple[Setup, RegistryPublisher]:
    """The setup of ``config`` and where its versions go.

    Raises:
        BaseError: the base cannot be found or is not the pinned one.
        ConfigError: a task and the base, or the method and the base, do not fit; both settings are named.
        AdapterError: the method finds nothing to attach to.
    """
    base = _base(config)
    encoder = meta_encoder(config.routing.encoder, base)
    specs = {name: _spec(config, base, name) for name in config.tasks}
    for spec in specs.values():
        check_fit(config, spec.layout)
    tables = {name: describe(entry.task) for name, entry in config.tasks.items()}
    setup = Setup(
        name=config.name,
        seed=config.seed,
        rounds=config.rounds,
        tasks={name: _task(config, base, specs[name], encoder.width) for name in config.tasks},
        scheme=config.scheme,
        scheme_json=json.dumps(describe(config.scheme)),
        server=config.server,
        limits=limits(config),
        evaluate_every=config.evaluate_every,
        publish_every=config.publish_every,
        identity=base.fingerprint.identity,
        facts=facts(config, base.fingerprint.identity, tables),
        combine=config.combine,
        renew=renewed,
        secure=secure(config),
        routing=config.routing,
        sharing=config.sharing,
        privacy=settings_of(config),
        encoder=encoder.encoder,
    )
    registry = open_registry(config.registry_folder, config.control)
    return setup, RegistryPublisher(registry, specs, tables, type(config.scheme).kind, config.base.max_tokens)


def limits(config: FederationConfig) -> Limits:
    """The cohort's limits and the wire's, as rounds take them."""
    cohort = config.cohort
    return Limits(
        min_sites=cohort.min_sites,
        wait_for_sites=cohort.expected,
        fraction=cohort.fraction,
        deadline=cohort.deadline,
        retries=cohort.retries,
        reach=config.wire.reach,
        codec=config.wire.codec,
        down=as_delta(config.wire.down),
        budget=config.wire.budget or 0,
        max_examples=config.max_examples,
        root=cohort.root or "",
    )


def secure(config: FederationConfig) -> SecureAggregation | None:
    """How sums are masked, or None where sites send in the clear."""
    table = config.secure_aggregation
    if not config.masks:
        return None
    return SecureAggregation(
        colluding=table.colluding,
        dropping=table.dropping,
        least=table.least or config.cohort.min_sites,
        grouped=table.least or enough(config.combine.size if isinstance(config.combine, Buckets) else 0, table.dropping),
        deadline=table.deadline,
        task_blind=table.task_blind,
        identities=table.identities,
        full=isinstance(config.privacy, Distributed),
    )


def facts(config: FederationConfig, identity: str, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """What may not change between two starts on one state folder."""
    found = {
        "name": config.name,
        "seed": config.seed,
        "base": identity,
        "method": describe(config.method),
        "scheme": describe(config.scheme),
        "server": describe(config.server),
        "tasks": {name: dict(table) for name, table in tasks.items()},
    }
    if config.sharing is not None:
        found["sharing"] = asdict(config.sharing)
    if config.combine is not None:
        found["combine"] = describe(config.combine)
    if config.start is not None:
        found["start"] = describe(config.start.how)
    starts = {name: describe(entry.start.how) for name, entry in config.tasks.items() if entry.start is not None}
    if starts:
        found["starts"] = starts
    if config.routing.encoder != (OWN,):
        found["encoder"] = list(config.routing.encoder)
    privacy = settings_of(config)
    if privacy is not None:  # the budget may be raised later: the noise stays what it was calibrated to
        found["privacy"] = describe(replace(privacy, epsilon=1.0))
    return dict(json.loads(json.dumps(found)))


def renewed(known: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that an earlier version wrote, with the defaults of settings that it did not know; unknown kinds stay as they are."""
    from fedpeft.methods import METHODS
    from fedpeft.privacy.settings import PRIVACY
    from fedpeft.schemes import SCHEMES, SERVER_OPTIMIZERS
    from fedpeft.schemes.robust import COMBINES
    from fedpeft.tasks import TASKS

    kinds: dict[str, Mapping[str, type[Any]]] = {"method": METHODS, "scheme": SCHEMES, "server": SERVER_OPTIMIZERS, "combine": COMBINES}
    kinds["privacy"] = PRIVACY
    found = {key: _full(table, known[key]) for key, table in kinds.items() if key in known}
    return {**known, **found, "tasks": {name: _full(TASKS, table) for name, table in known.get("tasks", {}).items()}}


def _full(kinds: Mapping[str, type[Any]], table: Any) -> Any:
    try:
        return json.loads(json.dumps(describe(build_plugin(dict(kinds), table, "journal"))))
    except ValueError:
        return table


def _base(config: FederationConfig) -> Base:
    from fedpeft.bases import load_base, meta_base

    spec = replace(config.base.spec, quantization="none")
    base = load_base(spec, "cpu") if config.method.needs_weights or any(map(config.start_of, config.tasks)) else meta_base(spec)
    found, pinned = base.fingerprint.identity, config.base.fingerprint
    if pinned is not None and pinned != found:
        raise BaseError(f"base {config.base.model}: identity is {found}, base.fingerprint pins {pinned}; get those weights, or pin anew")
    return base


def _spec(config: FederationConfig, base: Base, name: str) -> AdapterSpec:
    from fedpeft.adapters import make_spec

    task = config.tasks[name].task
    if task.head.kind == "lm" and base.family == "encoder":
        raise ConfigError(
            f"tasks.{name}.kind = {type(task).kind!r} needs a language model and base.model = {config.base.model!r} is an encoder; "
            "take a causal base or an encoder-decoder, or kind = 'classification'"
        )
    return make_spec(name, base, config.method, task.head)


def _task(config: FederationConfig, base: Base, spec: AdapterSpec, width: int) -> TaskSetup:
    task, seed = config.tasks[spec.task].task, start_seed(config.seed, spec.task, shared=config.sharing is not None)
    return TaskSetup(
        name=spec.task,
        layout=spec.layout,
        task_json=json.dumps(describe(task)),
        spec_json=json.dumps(spec.to_json()),
        settings_json=json.dumps(asdict(config.settings(spec.task)), sort_keys=True),
        initial=cache(lambda: _round_zero(config, base, spec, seed)),
        seed=seed,
        scores=task.scores,
        rows=task.name if task.name != spec.task else "",
        travel=lambda role: config.settings(spec.task).travel(role) * spec.method.lr_scale(role),
        counters=lengths(len(task.head.labels), width, spec.task, BINS),
    )


def _round_zero(config: FederationConfig, base: Base, spec: AdapterSpec, seed: int) -> Tensors:
    """The tensors that every site starts from. Raises `AdapterError` or `DataError` where the start does not fit."""
    from fedpeft.adapters import initial

    start = config.start_of(spec.task)
    if start is None:
        return initial(base, spec, seed).tensors
    from fedpeft.adapters.starts import make_start

    return make_start(start.how, base, spec, seed, _samples(config, base, spec.task)).tensors


def _samples(config: FederationConfig, base: Base, name: str) -> Samples | None:
    start = config.start_of(name)
    if start is None or start.data is None:
        return None
    from fedpeft.adapters.starts import Samples
    from fedpeft.tasks import read_rows

    task, source = config.tasks[name].task, start.data
    rows = [row for row in read_rows(source) if row.get("task", name) == name]
    if not rows:
        raise DataError(f"start.data: {source.label} holds no row of task {name!r}; its column `task` must name the federation's tasks")
    return Samples(task, task.encode(rows, base))
