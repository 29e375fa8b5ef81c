"""The site under plain `flwr run`: a ClientApp whose node config key ``site`` is the path of a site.toml.

The worker lives at module level: in a process that answers many messages (a simulation, a warm executor) the base and the
rows stay loaded. Flower's default starts a process per message; `fedpeft client join` does not.
"""

from __future__ import annotations

from threading import Lock

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft import plugins
from fedpeft.errors import ConfigError
from fedpeft.wire import flower
from fedpeft_client.config import load_site
from fedpeft_client.worker import Worker

_workers: dict[str, Worker] = {}
_lock = Lock()


def answer(message: Message, context: Context) -> Message:
    """Let the node's worker answer ``message``. Raises `ConfigError` when the node does not say which site it is."""
    path = str(context.node_config.get("site", ""))
    if not path:
        raise ConfigError("node config has no key 'site'; start the SuperNode with --node-config 'site=\"/path/to/site.toml\"'")
    with _lock:
        if path not in _workers:
            plugins.load()
            _workers[path] = Worker(load_site(path))
        reply = _workers[path].handle(flower.from_records(message.content))
    return Message(flower.to_records(reply), reply_to=message)


app = ClientApp()
for _kind in (app.train, app.evaluate, app.query):
    _kind("fedpeft")(answer)
