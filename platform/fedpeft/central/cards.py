"""Router cards of a job's tasks, from the rows that it trains on: by them requests without a task's name find its versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedpeft.files import write_atomic
from fedpeft.routing import MahalanobisRouter, Measure, RouterCard, pooled
from fedpeft.routing.cards import centroid, counts_of, histogram, make_card
from fedpeft.routing.closeness import TEXTED, read
from fedpeft.routing.moments import halves, moments, sums
from fedpeft.routing.ngrams import counted
from fedpeft.tasks import read_rows
from fedpeft.tasks.rows import stream_rows

if TYPE_CHECKING:
    from fedpeft.bases import Base, Encoder
    from fedpeft.training.config import CentralConfig, CentralTask

Rows = NDArray[np.float32]
MOST = 1024
"""Texts of a task that are embedded."""
FOLDER = "cards"
"""Where under the job's output they lie for whoever publishes."""
MADE = "made.json"
"""Beside them, written last: the digest of all that they depend on, and whose they are."""
FORM = 1
"""Of how cards are made of texts; another one is another digest."""


def keep(config: CentralConfig, base: Base) -> None:
    """Write the cards of all tasks for `kept`, unless they lie there already, made of the same texts by the same base.

    Raises:
        DataError: rows cannot be read.
        StorageError: no space or permission.
    """
    folder, texts = config.output / FOLDER, {name: list(_texts(entry)) for name, entry in config.tasks.items()}
    digest = _digest(config, base, texts)
    if _lie(folder, digest):
        return
    (folder / MADE).unlink(missing_ok=True)
    made = cards(texts, base)
    for name, card in made.items():
        write_atomic(folder / f"{name}.safetensors", card.to_bytes())
    write_atomic(folder / MADE, json.dumps({"digest": digest, "tasks": sorted(made)}).encode())


def _digest(config: CentralConfig, base: Base, texts: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 over all that decides what the cards say."""
    by = [FORM, base.encoder, config.base.quantization, config.base.max_tokens]
    return hashlib.sha256(json.dumps([by, texts], sort_keys=True).encode()).hexdigest()


def _lie(folder: Path, digest: str) -> bool:
    try:
        made = json.loads((folder / MADE).read_text(encoding="utf-8"))
        return made["digest"] == digest and all((folder / f"{name}.safetensors").is_file() for name in made["tasks"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def kept(config: CentralConfig, task: str) -> RouterCard | None:
    """What `keep` wrote of ``task``, or None. Raises `AdapterError` when the file is torn."""
    path = config.output / FOLDER / f"{task}.safetensors"
    return RouterCard.from_bytes(path.read_bytes()) if path.exists() else None


def onto(derived: RouterCard, card: RouterCard | None) -> RouterCard:
    """``derived`` of an adapter with what ``card`` says of its task."""
    return derived if card is None else replace(derived, card=card.card, counts={**derived.counts, **card.counts}, moments=card.moments)


def cards(texts: Mapping[str, Sequence[str]], encoder: Encoder) -> dict[str, RouterCard]:
    """Of each task that has texts its direction with a threshold, and its second moments beside those of all tasks."""
    known = {name: list(mine) for name, mine in texts.items() if mine}
    rows = {name: encoder.embed(mine) for name, mine in known.items()}
    own = {name: replace(moments(sums(halves(mine)[0])), ngrams=counted(halves(known[name])[0])) for name, mine in rows.items()}
    pools = [pooled(own.values())] if own else []
    return {name: _card(rows[name], known[name], Measure(own[name], pool), encoder.encoder) for pool in pools for name in rows}


def _card(rows: Rows, texts: list[str], measure: Measure, encoder: str) -> RouterCard:
    total, count = rows.sum(axis=0, dtype=np.float64), len(rows)
    found = RouterCard(make_card(total, count, histogram(rows, centroid(total, count)), encoder=encoder))
    known = {MahalanobisRouter.kind: None, TEXTED: halves(texts)[1]}
    counts = {kind: counts_of(read((measure,), halves(rows)[1], mine)[1][:, 0]) for kind, mine in known.items()}
    return replace(found, counts=counts, moments=measure)


def _texts(entry: CentralTask) -> Iterator[str]:
    """At most `MOST` texts: evenly spread, or of a stream the first."""
    rows = list(islice(stream_rows(entry.data, "train"), MOST)) if entry.stream else read_rows(entry.data, "train")[: entry.cap]
    return map(entry.task.text_of, _spread(rows))


def _spread(rows: list[dict[str, object]]) -> Iterable[dict[str, object]]:
    return rows[:: -(-len(rows) // MOST) or 1]
