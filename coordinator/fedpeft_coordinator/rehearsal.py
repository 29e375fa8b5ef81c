"""A federation's rounds in one process with its sites, over the in-memory transport: no link, no registry, the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedpeft.adapters import Adapter
from fedpeft_coordinator.build import build
from fedpeft_coordinator.config import load_federation
from fedpeft_coordinator.events import Events, Listener
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.rounds import Coordinator
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.transport_memory import Handler, MemoryTransport
from fedpeft_coordinator.up import hello


def rehearse(federation: Path, sites: Mapping[str, Handler], listen: Listener) -> dict[str, Adapter]:
    """Run all rounds of a federation.toml over ``sites``; the adapters by task. ``listen`` hears every event.

    Raises:
        FedpeftError: what a federation of these settings would end with.
    """
    config = load_federation(federation)
    setup, publisher = build(config)
    transport, events = MemoryTransport(dict(sites), hello(setup)), Events(None, [listen])
    rounds = Coordinator(setup, Journal(config.database_url), Store(config.state / "blobs"), transport, events)
    last = rounds.run()[-1].tasks
    return {name: Adapter(spec, rounds.tensors(name, last[name].current)) for name, spec in publisher.specs.items()}
