"""The worker process: takes its SuperNode's tasks itself and answers them warm: `python -m fedpeft_client.executor SITE ADDRESS SECRET`."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft import plugins
from fedpeft.errors import FedpeftError, LinkError
from fedpeft.processes import hold
from fedpeft.wire.pacing import pause
from fedpeft_client.config import load_site
from fedpeft_client.status import MESSAGE, Pulse
from fedpeft_client.worker import Worker

if TYPE_CHECKING:
    from flwr.app import RecordDict

    from fedpeft.wire._compat import TaskInfo

POLL_SECONDS = 0.1
RETRY_SECONDS = 1.0
log = logging.getLogger("fedpeft.executor")


def serve(worker: Worker, address: str, secret: bytes, pulse: Pulse) -> None:
    """Take tasks at ``address`` and answer them until the worker's device is broken; a lost link is waited out."""
    silent, quiet = False, time.monotonic()
    while not worker.broken:
        try:
            done = _one(worker, address, secret, pulse)
            pulse.idle(int(done), worker.base_loads, worker.faults)
            quiet, silent = time.monotonic() if done else quiet, False
            time.sleep(0.0 if done else pause(time.monotonic() - quiet, POLL_SECONDS))
        except LinkError as fault:
            if not silent:
                log.warning("%s; trying again every %g s", fault, RETRY_SECONDS)
            silent = True
            time.sleep(RETRY_SECONDS)


def _one(worker: Worker, address: str, secret: bytes, pulse: Pulse) -> bool:
    """Answer one task if one is waiting; whether there was one."""
    from fedpeft.wire import _compat

    token = _compat.acquire_clientapp(address, secret)
    if token is None:
        return False
    pulse.progress(MESSAGE, 0)
    done = _compat.run_task(address, token, lambda records, info: _handle(worker, records, info))
    log.info("answered %s of run %d%s", done.info.message_type, done.info.run_id, f" with {done.fault!r}" if done.fault else "")
    return True


def _handle(worker: Worker, records: RecordDict, _info: TaskInfo) -> RecordDict:
    from fedpeft.wire import flower

    return flower.to_records(worker.handle(flower.from_records(records)))


def main() -> int:
    """Entry of the process; the base is loaded before the first task, so that a base that cannot be loaded ends `join` at once."""
    hold()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per poll hides all others
    path, address, secret = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    try:
        plugins.load()
        site = load_site(path)
        pulse = Pulse(site.state / "worker.json")
        worker = Worker(site, pulse.progress)
        log.info("base %s is ready on %s", worker.base.fingerprint.identity[:12], worker.base.device)
        serve(worker, address, secret.read_bytes(), pulse)
    except FedpeftError as fault:
        log.error("%s", fault)
        print(f"fedpeft: {fault}", file=sys.stderr, flush=True)
        return fault.exit_code
    return 1


if __name__ == "__main__":
    sys.exit(main())
