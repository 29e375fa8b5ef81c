"""A job's adapters into the registry, as signed versions with their lineage; and adapters of a registry to start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from fedpeft.adapters import Adapter
from fedpeft.central.cards import kept, onto
from fedpeft.config import describe
from fedpeft.errors import ConfigError
from fedpeft.registry import Manifest, Registry, Version
from fedpeft.registry.router_cards import derived

if TYPE_CHECKING:
    from fedpeft.central.job import Trained
    from fedpeft.training.config import CentralConfig

ANY = "version:"
"""What a reference may begin with on the command line."""


def publish(config: CentralConfig, trained: Trained, parents: Mapping[str, str]) -> list[Version]:
    """One version per adapter; values that the registry holds already keep the version that they have.

    Raises:
        ConfigError: the job names no registry.
        AdapterError: a value is not finite.
        StorageError: no space or permission.
    """
    if config.registry is None:
        raise ConfigError('registry: the job\'s file names none; add registry = "FOLDER" above its tables')
    registry, found = Registry(config.registry), []
    for name, adapter in trained.adapters.items():
        held = [version for version in registry.list() if version.manifest.adapter == adapter.digest]
        if held:
            found.append(held[-1])
            continue
        entry = config.tasks.get(name)
        manifest = Manifest(
            task_settings=describe(entry.task) if entry else {},
            quantization=(config.base.quantization,),
            max_tokens=config.base.max_tokens,
            scheme="central",
            federation=config.name,
            round=trained.steps,
            parents=(parents[adapter.spec.task],) if adapter.spec.task in parents else (),
            metrics=trained.scores.get(name, {}),
            examples=trained.examples.get(name, sum(trained.examples.values())),
        )
        card = kept(config, name) if entry else None
        if card is not None and card.card is not None:
            manifest = replace(manifest, card=card.card.to_json())
        found.append(registry.publish(adapter, manifest, router=onto(derived(adapter, manifest), card)))
    return found


def starts(config: CentralConfig, refs: list[str]) -> tuple[dict[str, Adapter], dict[str, str]]:
    """The adapters that ``refs`` name in the job's registry, and the digests of their versions, by task.

    Raises:
        ConfigError: the job names no registry, or has no such task, or two references are of one task.
        AdapterError: no such version.
    """
    if refs and config.registry is None:
        raise ConfigError('--from: the job\'s file names no registry; add registry = "FOLDER" above its tables')
    adapters: dict[str, Adapter] = {}
    parents: dict[str, str] = {}
    for ref in refs:
        registry = Registry(config.registry)  # type: ignore[arg-type]
        version = registry.get(ref.removeprefix(ANY))
        if version.task not in (*config.tasks, f"{config.name}.shared"):
            raise ConfigError(f"--from {ref}: is of task {version.task!r}, the job trains {sorted(config.tasks)}; name one of these")
        if version.task in adapters:
            raise ConfigError(f"--from {ref}: a version of task {version.task!r} is given already; give one a task")
        adapters[version.task], parents[version.task] = registry.load(version.digest), version.digest
    return adapters, parents
