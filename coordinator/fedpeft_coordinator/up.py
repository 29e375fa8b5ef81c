"""`fedpeft coordinator up`: everything together, in the foreground, until the last round is published."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fedpeft import __version__
from fedpeft.certificates import lapsing
from fedpeft.cli.output import size
from fedpeft.wire.v1.federation_pb2 import Hello
from fedpeft_coordinator import display, status
from fedpeft_coordinator.admission import key_files
from fedpeft_coordinator.build import build
from fedpeft_coordinator.children import Child
from fedpeft_coordinator.config import FederationConfig, Link
from fedpeft_coordinator.control.settings import Settings
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.lock import held
from fedpeft_coordinator.rounds import Coordinator
from fedpeft_coordinator.setup import Setup
from fedpeft_coordinator.status import Watched
from fedpeft_coordinator.store import Store
from fedpeft_coordinator.supervise import LinkProcess, check_port
from fedpeft_coordinator.transport_flower import Connect, FlowerTransport


def up(config: FederationConfig, console: Console) -> None:
    """Run the federation of ``config``, from the start or from where it stopped.

    Raises:
        PolicyError: a certificate is not valid now.
        FedpeftError: what stopped it; nothing committed is lost, and the same call goes on.
    """
    ending = [text for path in certificates(config.link) if (text := lapsing(path))]
    with held(config.state), display.shown(config.rounds, console) as show:
        events = Events(config.state / "events.jsonl", [show])
        link = LinkProcess(config.link, config.state / "link", events)
        link.start()
        try:
            console.print(greeting(config), highlight=False, soft_wrap=True)
            for text in ending:
                console.print(f"[yellow]{escape(text)}[/yellow]", highlight=False, soft_wrap=True)
            with controlled(config, events):
                run(config, link.connect, events, lambda: link.barred)
        finally:
            link.stop()
    summary(status.status(config), console)


def certificates(link: Link) -> tuple[Path, ...]:
    """What the link shows to sites, and what they believe it by."""
    return (link.tls.ca, link.tls.cert) if link.tls else ()


def greeting(config: FederationConfig) -> str:
    """Where the federation listens, to whom, and what it waits for or goes on with."""
    link = config.link
    known = ", ".join(path.stem for path in key_files(link.node_keys)) if link.node_auth else ""
    who = f"registered sites: {known}" if link.node_auth else "any site"
    guard = f"TLS, {who}" if link.tls else f"no TLS, {who}"
    return f"{config.name} listens at {link.host}:{link.port} ({guard}); {_beginning(config)}"


def _beginning(config: FederationConfig) -> str:
    last, needed = Journal(config.database_url).last() if status.begun(config) else None, config.cohort.expected
    if last is None:
        return f"{needed} site{'s' * (needed > 1)} must join before the first round"
    number = last.number + (last.step == "published")
    return f"it goes on with round {number} of {config.rounds}" if number <= config.rounds else f"all {config.rounds} rounds are done"


def run(config: FederationConfig, connect: Connect, events: Events, barred: Callable[[], frozenset[str]] = frozenset) -> None:
    """Run the rounds over runs that ``connect`` opens, without the ``barred`` sites. Raises `FedpeftError`."""
    setup, publisher = build(config)
    transport = FlowerTransport(connect, hello(setup), events, barred)
    events("masking", on=config.masks, sites=config.cohort.min_sites, enabled=config.secure_aggregation.enabled)
    try:
        Coordinator(setup, Journal(config.database_url), Store(config.state / "blobs"), transport, events, publisher).run()
    finally:
        transport.close()


@contextmanager
def controlled(config: FederationConfig, events: Events) -> Iterator[None]:
    """Run the control plane beside the rounds where the federation wants one. Raises `LinkError` when its port is taken."""
    if config.control is None:
        yield
        return
    check_port(config.control.host, config.control.port, "control")
    folder = config.state / "control"
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / "settings.json").resolve()
    Settings(config.control, config.registry_folder.resolve(), folder.resolve(), Watched.of(config)).save(path)
    child = Child("control", [sys.executable, "-m", "fedpeft_coordinator.control.process", str(path)], folder / "control.log", {}, events)
    child.start()
    try:
        yield
    finally:
        child.stop()


def hello(setup: Setup) -> Hello:
    """What every new node is told."""
    tasks = sorted({task.rows or name for name, task in setup.tasks.items()})
    return Hello(federation=setup.name, version=__version__, tasks=tasks, task_blind=setup.task_blind)


def summary(found: dict[str, Any], console: Console) -> None:
    """Print how the federation stands."""
    done = found["step"] == "published" and found["round"] >= found["rounds"]
    idle = "" if done or found["running"] else "; no coordinator runs on it now: `fedpeft coordinator up` goes on"
    console.print(
        f"{found['federation']}: round {found['round']} of {found['rounds']}, {found['step']}{idle}", highlight=False, soft_wrap=True
    )
    console.print(f"sums over sites: {'masked' if found['masked'] else 'in the clear'}", highlight=False)
    tasks = Table(Column("task", no_wrap=True), "rounds moved", "loss", "drift", "scores", "version")
    for name, task in found["tasks"].items():
        scores = ", ".join(f"{metric} {value:.4f}" for metric, value in sorted(task["scores"].items()))
        loss = "" if task["loss"] is None else f"{task['loss']:.4f}"
        drift = ", ".join(f"{value:.3f}" if key == "drift" else f"{key} {value:.3f}" for key, value in sorted(task["drift"].items()))
        tasks.add_row(name, str(task["updated"]), loss, drift, scores, (task["version"] or "")[:12] or escape(task["last_reason"] or ""))
    console.print(tasks)
    for name, task in found["tasks"].items():
        spent = task["epsilon"]
        if spent is not None:
            console.print(
                f"privacy of {name} ({spent['protects']}): epsilon {spent['spent']:.3f} of {spent['budget']:g} spent, "
                f"{spent['left']:.3f} left, at delta {spent['delta']:g}",
                highlight=False,
                soft_wrap=True,
            )
    sites = Table(Column("site", no_wrap=True), "state", "tasks (rows)", "base loads", "up", "down", "training / answer")
    for name, site in found["sites"].items():
        rows = ", ".join(f"{task} ({count})" for task, count in sorted(site["tasks"].items()))
        times = "" if site["seconds_training"] is None else f"{site['seconds_training']:.1f} / {site['seconds_answer']:.1f} s"
        traffic = size(site["bytes_up"]), size(site["bytes_down"])
        sites.add_row(name, site["refused"] or site["state"], rows, str(site["base_loads"]), *traffic, times)
    console.print(sites)
    for name, site in found["sites"].items():
        if site["last_drop_out"]:
            console.print(f"last drop-out of {name}: {escape(site['last_drop_out'])}", highlight=False, soft_wrap=True)
    console.print(f"versions: fedpeft adapters list --registry {found['registry']}", highlight=False, soft_wrap=True)
