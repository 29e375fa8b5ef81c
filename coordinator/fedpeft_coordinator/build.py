"""From a federation.toml to what rounds need: plain values, and what `laying` says of the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.bases import BaseSpec, Fingerprint, fingerprint
from fedpeft.bases.base import OWN
from fedpeft.config import build as build_plugin
from fedpeft.config import describe
from fedpeft.errors import BaseError, ConfigError
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
from fedpeft_coordinator.laying import Beginning, Laid, begun, laid
from fedpeft_coordinator.private_rules import lengths, settings_of
from fedpeft_coordinator.release import Release
from fedpeft_coordinator.setup import Limits, SecureAggregation, Setup, TaskSetup

if TYPE_CHECKING:
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
    dense = replace(config.base.spec, quantization="none")
    known = _fingerprint(config, dense)
    heads = {name: entry.task.head for name, entry in config.tasks.items()}
    base = laid(dense, known, config.method, heads, config.routing.encoder)
    specs = {name: _spec(config, base, known.identity, name) for name in config.tasks}
    starts = Starts(config, dense, base, specs)
    for spec in specs.values():
        check_fit(config, spec.layout)
    tables = {name: describe(entry.task) for name, entry in config.tasks.items()}
    setup = Setup(
        name=config.name,
        seed=config.seed,
        rounds=config.rounds,
        tasks={name: _task(config, starts, specs[name]) for name in config.tasks},
        scheme=config.scheme,
        scheme_json=json.dumps(describe(config.scheme)),
        server=config.server,
        limits=limits(config),
        evaluate_every=config.evaluate_every,
        publish_every=config.publish_every,
        identity=known.identity,
        facts=facts(config, known.identity, tables),
        combine=config.combine,
        renew=renewed,
        secure=secure(config),
        routing=config.routing,
        sharing=config.sharing,
        privacy=settings_of(config),
        encoder=base.encoder,
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


def _fingerprint(config: FederationConfig, spec: BaseSpec) -> Fingerprint:
    known = fingerprint(spec)
    found, pinned = known.identity, config.base.fingerprint
    if pinned is not None and pinned != found:
        raise BaseError(f"base {config.base.model}: identity is {found}, base.fingerprint pins {pinned}; get those weights, or pin anew")
    return known


def _spec(config: FederationConfig, base: Laid, identity: str, name: str) -> AdapterSpec:
    task = config.tasks[name].task
    if name not in base.layouts:
        raise ConfigError(
            f"tasks.{name}.kind = {type(task).kind!r} needs a language model and base.model = {config.base.model!r} is of family "
            f"{base.family!r}; take a causal base or an encoder-decoder, or kind = 'classification'"
        )
    return AdapterSpec(name, identity, config.base.model, config.method, task.head, base.layouts[name], base.family == "vision")


def _task(config: FederationConfig, starts: Starts, spec: AdapterSpec) -> TaskSetup:
    task = config.tasks[spec.task].task
    return TaskSetup(
        name=spec.task,
        layout=spec.layout,
        task_json=json.dumps(describe(task)),
        spec_json=json.dumps(spec.to_json()),
        settings_json=json.dumps(asdict(config.settings(spec.task)), sort_keys=True),
        initial=lambda: starts.round_zero(spec.task),
        seed=starts.seed(spec.task),
        scores=task.scores,
        rows=task.name if task.name != spec.task else "",
        travel=lambda role: config.settings(spec.task).travel(role) * spec.method.lr_scale(role),
        counters=lengths(len(task.head.labels), starts.laid.width, spec.task, BINS),
    )


@dataclass(frozen=True)
class Starts:
    """The tensors that every site starts from, made when the first is asked for."""

    config: FederationConfig
    base: BaseSpec
    laid: Laid
    specs: Mapping[str, AdapterSpec]

    def seed(self, task: str) -> int:
        """The seed of the task's round 0."""
        return start_seed(self.config.seed, task, shared=self.config.sharing is not None)

    def round_zero(self, task: str) -> Tensors:
        """Round 0 of ``task``. Raises `AdapterError` or `DataError` where its start does not fit."""
        return self._all[task]

    @cached_property
    def _all(self) -> dict[str, Tensors]:
        given = {task: self.config.start_of(task) for task in self.specs}
        drawn = {task: self.laid.drawn(spec, self.seed(task)) for task, spec in self.specs.items() if given[task] is None}
        beginnings = {task: self._beginning(task) for task in self.specs if drawn.get(task) is None}
        made = begun(self.base, beginnings) if beginnings else {}
        return {task: tensors for task, tensors in drawn.items() if tensors is not None} | made

    def _beginning(self, task: str) -> Beginning:
        start, of = self.config.start_of(task), (self.specs[task], self.seed(task), self.config.tasks[task].task)
        return Beginning(*of) if start is None else Beginning(*of, start.how, start.data)
