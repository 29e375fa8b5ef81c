"""The site's private pairs beside the versions that it serves, weighed text by text; neither pairs nor rows leave the site."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.adapters import Adapter
from fedpeft.errors import FedpeftError
from fedpeft.routing.nearness import Nearness
from fedpeft.schemes.feddpa import PRIVATE
from fedpeft.serving import Served
from fedpeft.serving.beside import Embed
from fedpeft_client.config import SiteConfig
from fedpeft_client.personal import Personal
from fedpeft_client.shelf import Shelf
from fedpeft_client.store import Store

if TYPE_CHECKING:
    from fedpeft.tasks import Task

log = logging.getLogger("fedpeft.serving")


@dataclass
class Own:
    """What `fedpeft.serving.beside.Beside` asks for, from the state and the rows of ``site``.

    A pair is the last one that training left for the task; a text's weight is its nearness to ``serve.own_rows`` rows of the task,
    evenly spread over the site's, which are embedded when the first text asks.
    """

    site: SiteConfig
    _near: dict[str, asyncio.Future[Nearness]] = field(default_factory=dict)

    def adapter(self, published: Adapter) -> Adapter | None:
        """The private pair of the published adapter's task, if training kept one of its shape."""
        layout = published.spec.layout
        task, roles = published.spec.task, layout.roles & PRIVATE
        if roles != PRIVATE or task not in self.site.data or not self.site.serve.own_rows:
            return None
        personal = Personal(Store(self.site.state / "personal", 1))
        kept = personal.newest(task).private(layout.subset(roles))
        if kept is None:
            log.info("task %s: no private pair of this shape is kept here; the shared one answers alone", task)
            return None
        return Adapter(replace(published.spec, layout=kept.layout), kept)

    def texts(self, task: Task) -> list[str]:
        """The rows that a text's nearness is measured by. Raises `DataError` when they cannot be read."""
        rows = self.shelf.rows(task.name, "train")
        return [task.text_of(row) for row in rows[:: -(-len(rows) // self.site.serve.own_rows)]]

    @cached_property
    def shelf(self) -> Shelf:
        """The site's rows."""
        return Shelf(self.site)

    async def weight(self, served: Served, text: str, embed: Embed) -> float:
        """The nearness of ``text``; 0 where the site's rows cannot be read, which is logged."""
        task = served.task.name
        if task not in self._near:
            self._near[task] = asyncio.ensure_future(self._nearness(served, embed))
        try:
            near = await asyncio.shield(self._near[task])
        except FedpeftError as fault:
            self._near.pop(task, None)
            log.warning("task %s: the private pair stays out: %s", task, fault)
            return 0.0
        return near.weight(await embed(text))

    async def _nearness(self, served: Served, embed: Embed) -> Nearness:
        texts = await asyncio.to_thread(self.texts, served.task)
        vectors = await asyncio.gather(*map(embed, texts))
        return Nearness(np.stack(vectors), self.site.serve.own_scale)
