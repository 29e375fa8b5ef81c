"""`fedpeft client serve`: load the base, bring in what the registry serves, answer until interrupted."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.bases import BaseSpec
from fedpeft.config import Section, override, parse
from fedpeft.control.place import Place, beside
from fedpeft.errors import StorageError
from fedpeft.registry import Registry
from fedpeft.service import base_of
from fedpeft.serving import Source
from fedpeft_client.config import SiteBase, SiteConfig, load_site
from fedpeft_client.serve.settings import Serve

if TYPE_CHECKING:
    from fedpeft.bases import Base
    from fedpeft.serving.backend import Backend
    from fedpeft.serving.beside import Beside
    from fedpeft_client.serve.ending import Server


def serve(site: Path | None, registry: str | None, overrides: Mapping[str, str]) -> int:
    """Answer until SIGINT or SIGTERM; then no request is accepted, and running ones go on for ``patience_seconds``, or a second signal.

    Returns the number of the first signal.

    Raises:
        ConfigError: settings that contradict each other, or a key file that is not as it must be.
        AdapterError: neither a base nor a registry with a version is given.
        BaseError: the base cannot be loaded, or cannot be served in batches.
        StorageError: the address is taken.
    """
    config = None if site is None else load_site(site, overrides)
    settings, spec, device = _settings((site, config), registry, overrides)
    settings.key_digests()
    listener = _listen(settings)
    with listener:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
        for noisy in ("httpx", "uvicorn.access"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        return _answer((settings, spec, device), listener, config)


class Alone(Section):
    """What may be set without a site.toml."""

    serve: Serve = Serve()
    base: SiteBase | None = None
    device: str = "auto"


def _settings(
    site: tuple[Path | None, SiteConfig | None], registry: str | None, overrides: Mapping[str, str]
) -> tuple[Serve, BaseSpec, str]:
    path, config = site
    if path is not None and config is not None:
        chosen = _at(config.serve, registry or config.serve.registry or beside(path.resolve().parent))
        return chosen, config.base.spec(), config.device
    alone = _alone(overrides)
    chosen = _at(alone.serve, registry or alone.serve.registry or beside(Path()))
    return chosen, alone.base.spec() if alone.base else _base_of(chosen), alone.device


def _at(settings: Serve, registry: str) -> Serve:
    return settings.model_copy(update={"registry": registry})


def _alone(overrides: Mapping[str, str]) -> Alone:
    table: dict[str, Any] = {}
    for key, value in overrides.items():
        override(table, key, value)
    return parse(table, Alone, "--set")


def source(settings: Serve) -> Source:
    """Where versions come from. Raises `ConfigError` on a wrong address or identity."""
    assert settings.registry is not None
    place = Place(settings.registry, settings.identity)
    return place.far() if place.is_far else Registry(Path(place.root))


def _base_of(settings: Serve) -> BaseSpec:
    """The base that the newest versions were trained on. Raises `AdapterError` when nothing is served there."""
    versions = source(settings)
    return base_of({task: versions.get(task) for task in list(versions.heads())[:1]})


def _listen(settings: Serve) -> socket.socket:
    """The bound socket: a taken address is known before the base is loaded."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as fault:
        listener.close()
        raise StorageError(f"serve: {settings.host}:{settings.port} cannot be listened on: {fault.strerror}; set serve.port") from None
    return listener


def _answer(what: tuple[Serve, BaseSpec, str], listener: socket.socket, site: SiteConfig | None) -> int:
    from fedpeft.bases import load_base
    from fedpeft_client.serve.own import Own

    settings, spec, device = what
    with opened(settings, load_base(spec, device), Own(site) if site else None) as backend:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        name = f"http{'s' if settings.certificate else ''}://{host}:{listener.getsockname()[1]}"
        tasks = sorted(backend.catalog.served())
        listener.listen()  # who reads the next line may call at once
        print(f"serving {spec.model} and {len(tasks)} tasks {tasks} at {name}/v1", flush=True)
        running = server(settings, backend)
        running.run(sockets=[listener])
        return running.asked


def opened(settings: Serve, base: Base, own: Beside | None = None) -> Backend:
    """A backend with everything that can be served now, beside it what the site keeps for itself; what cannot be is named in the log."""
    from fedpeft.serving import Limits
    from fedpeft.serving.backend import Backend

    limits = Limits(settings.rows, settings.queue, settings.bite)
    backend = Backend(base, source(settings), limits, settings.router, own)
    try:
        backend.catalog.refresh()
    except BaseException:
        backend.close()
        raise
    return backend


def server(settings: Serve, backend: Backend) -> Server:
    """Uvicorn over the application, bounded in connections; when it ends it closes the backend."""
    import uvicorn

    from fedpeft_client.serve.app import build
    from fedpeft_client.serve.ending import Door, Server

    door = Door()
    config = uvicorn.Config(
        build(backend, settings, door),
        log_config=None,
        access_log=False,
        http="h11",
        ws="none",
        server_header=False,
        limit_concurrency=2 * settings.connections + 16,  # the guard refuses earlier, in the API's own shape
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,  # for last words: by then no request runs
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
    )
    return Server(config, door, settings.patience_seconds, backend.close)
