"""Processes of a fake federation over Flower: its coordinator on a real SuperLink, and a site's worker behind a real SuperNode."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from fedpeft.wire.v1.federation_pb2 import Hello
from fedpeft_coordinator.events import Events
from fedpeft_coordinator.journal import Journal
from fedpeft_coordinator.rounds import Coordinator
from fedpeft_coordinator.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "coordinator"))
import fake


def over_flower(folder: Path, port: int, rounds: int) -> None:
    """A coordinator process over a real SuperLink, with TLS and registered keys where there is a folder of them; prints the digests."""
    from fedpeft_coordinator.config import Link, Tls
    from fedpeft_coordinator.supervise import LinkProcess
    from fedpeft_coordinator.transport_flower import FlowerTransport

    made = fake.setup(rounds=rounds, wait_for_sites=len(fake.HOLDINGS))
    made = replace(made, limits=replace(made.limits, deadline=120.0, retries=5), evaluate_every=0)
    events = Events(folder / "events.jsonl")
    keys = folder / "keys"
    tls = Tls(ca=keys / "ca.crt", cert=keys / "server.pem", key=keys / "server.key") if keys.exists() else None
    link = LinkProcess(Link(port=port, tls=tls, node_auth=tls is not None, node_keys=keys), folder / "link", events)
    link.start()
    transport = FlowerTransport(link.connect, Hello(tasks=list(made.tasks)), events)
    journal = Journal(f"sqlite:///{folder / 'journal.sqlite'}")
    try:
        last = Coordinator(made, journal, Store(folder / "blobs"), transport, events).run()[-1]
    finally:
        transport.close()
        link.stop()
    print(json.dumps({name: row.current for name, row in last.tasks.items()}))


def site_process(name: str, address: str, secret: Path, pause: float) -> None:
    """A site's worker behind a real SuperNode; what it keeps dies with it."""
    from fedpeft.errors import LinkError
    from fedpeft.wire import _compat, flower

    site = fake.slow(fake.Site(name, dict(fake.HOLDINGS[name])), pause)
    while True:
        try:
            token = _compat.acquire_clientapp(address, secret.read_bytes())
            if token:
                _compat.run_task(address, token, lambda records, _info: flower.to_records(site(flower.from_records(records))))
            else:
                time.sleep(0.1)
        except LinkError as fault:
            print(fault, flush=True)
            time.sleep(0.3)


if __name__ == "__main__":
    what, arguments = sys.argv[1], sys.argv[2:]
    if what == "flower":
        over_flower(Path(arguments[0]), int(arguments[1]), int(arguments[2]))
    else:
        site_process(arguments[0], arguments[1], Path(arguments[2]), float(arguments[3]))
