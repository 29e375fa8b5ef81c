"""Sites in one process, for federations that are rehearsed in one place: bases and tokenised rows are shared by all their runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft.wire import Envelope
from fedpeft_client.config import SiteConfig, load_site
from fedpeft_client.shelf import Shelf
from fedpeft_client.worker import Worker


@dataclass(frozen=True)
class Sites:
    """Opens the sites of one run after another; their rows must stay as they were when first read."""

    load: Callable[[BaseSpec, str], Base] = field(default_factory=lambda: cache(load_base))
    _shelves: dict[tuple[str, BaseSpec], Shelf] = field(default_factory=dict)

    def __call__(self, files: Iterable[Path]) -> dict[str, Callable[[Envelope], Envelope]]:
        """What answers messages, by site, of the site.toml ``files``. Raises `ConfigError`."""
        return {site.name: self._open(site).handle for site in map(load_site, files)}

    def _open(self, site: SiteConfig) -> Worker:
        worker = Worker(site, load=self.load)
        worker.shelf = self._shelves.setdefault((site.name, site.base.spec()), worker.shelf)
        return worker
