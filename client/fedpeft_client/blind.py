"""What a site answers where the federation hides who holds which task: for a task without rows the same form as any other, of zeros.

The coordinator asks every site for every task and sees masked sums alone, so it cannot tell zeros from values. The number of sites that
hold the task is a counter in the sum. What is not hidden: how long a site works, and that a site fails in a task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from fedpeft.errors import DataError
from fedpeft.routing import BINS
from fedpeft.routing.closeness import CLOSENESS, TEXTED
from fedpeft.routing.moments import BUCKETS, MOMENTS, values_of
from fedpeft.routing.ngrams import NGRAMS
from fedpeft.update import Counters, Update
from fedpeft.wire.v1.federation_pb2 import Hello, Holding
from fedpeft_client import answers
from fedpeft_client.answers import Answer
from fedpeft_client.plan import Work
from fedpeft_client.shelf import Shelf, Split

if TYPE_CHECKING:
    from fedpeft.bases import Encoder


def holdings(hello: Hello) -> list[Holding]:
    """What is said of holdings: every task that the federation names, and nothing of it; nothing at all where it does not hide them."""
    return [Holding(task=task) for task in hello.tasks] if hello.task_blind else []


def holds(shelf: Shelf, task: str, splits: Iterable[Split]) -> bool:
    """Whether the site has rows of ``task`` in all of ``splits``, and may use them."""
    with suppress(DataError):
        return task in shelf.site.allowed_tasks and all(shelf.count(task, split) > 0 for split in splits)
    return False


def blank(work: Work, encoder: Callable[[str], Encoder]) -> Answer:
    """The answer of a site that holds nothing of the task: zeros of weight 0, and all the counters that it would have, as zeros."""
    if not work.scores:
        return answers.of_update(work.plan.task, Update.zero(work.up, work.grid), 0.0, work.plan.adapter_digest)
    return answers.of_counters(work.plan.task, _zeros(work, encoder), 0.0, work.plan.adapter_digest)


def _zeros(work: Work, encoder: Callable[[str], Encoder]) -> Counters:
    """Counters of an evaluation (see `fedpeft_client.rounds.evaluate`)."""
    lengths = {f"{whose}.{name}": length for whose in ("adapter", "base") for name, length in work.task.counted.items()}
    if work.plan.want_embedding or work.plan.want_moments:
        width = encoder(work.plan.encoder).width
        lengths |= {"embedding.sum": width, "embedding.count": 1} if work.plan.want_embedding else {}
        lengths |= {MOMENTS: values_of(width)} if work.plan.want_moments else {}
    lengths |= {NGRAMS: BUCKETS} if work.plan.want_ngrams else {}
    if work.plan.HasField("own"):
        lengths |= {CLOSENESS: BINS} | ({TEXTED: BINS} if work.plan.own.ngrams and work.plan.pool.ngrams else {})
    lengths |= {f"cosine.{centroid.task}": BINS for centroid in work.plan.centroids}
    return {name: (0.0,) * length for name, length in lengths.items()}
