"""The embedded data: four tasks on real text that every Python brings along, the documentation and messages of its standard library.

| task | question | truth comes from |
|---|---|---|
| area | which area of the library is the passage about? | the module it stands in |
| kind | does it document a module, a class, an exception or a function? | the statement it belongs to |
| effect | does the function described answer yes or no, return a value, or act? | the return statements of its body |
| error | which error does this message come with? | the ``raise`` statement it stands in |

Rows ``{task, client, split, text, label}``; ``text`` is a request as a person would put it, a short question and the passage, in which
the name of the thing documented is masked. A client keeps a group of modules, not every task, and mostly the labels
that are its own (`USUAL`), so that sites really differ. Nothing is imported, executed or written to disk.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise

from fedpeft.errors import DataError
from fedpeft.tasks.protocol import Row
from fedpeft.tasks.split import position, split_of
from fedpeft.tasks.stdlib_sources import Document, scan

STDLIB_LABELS: dict[str, tuple[str, ...]] = {
    "area": ("concurrency", "desktop", "files", "internet", "language", "numbers", "testing", "text"),
    "kind": ("class", "exception", "function", "module"),
    "effect": ("acts", "answers", "returns"),
    "error": ("RuntimeError", "TypeError", "ValueError"),
}

HOLDS: dict[str, tuple[str, ...]] = {
    "web": ("area", "kind", "error"),
    "mail": ("area", "kind", "error"),
    "desktop": ("area", "kind", "effect"),
    "science": ("area", "kind", "effect", "error"),
    "systems": ("area", "effect", "error"),
    "tooling": ("area", "effect", "error"),
}
"""Which tasks each client keeps rows of."""

USUAL: dict[tuple[str, str], tuple[str, ...]] = {
    ("kind", "web"): ("class",),
    ("kind", "mail"): ("class", "exception"),
    ("kind", "desktop"): ("function", "module"),
    ("kind", "science"): ("function", "module"),
    ("effect", "desktop"): ("acts",),
    ("effect", "science"): ("acts", "answers"),
    ("effect", "systems"): ("returns",),
    ("effect", "tooling"): ("returns", "answers"),
    ("error", "web"): ("ValueError",),
    ("error", "mail"): ("ValueError", "RuntimeError"),
    ("error", "science"): ("TypeError",),
}
"""(task, client): the labels it has plenty of; it keeps `FEW` rows of each other one. All labels where none are named."""

CAP, FEW = 120, 15
"""Most rows that a client keeps of a usual and of another label of a task, chosen by hash; training stays short."""

STDLIB_QUESTIONS: dict[str, str] = {
    "area": "Which area?",
    "kind": "What kind?",
    "effect": "Which effect?",
    "error": "Which error?",
}
"""What each text begins with: one passage can be asked about in several ways, and only the question tells the tasks apart."""

MIN_WORDS = 4


def stdlib_rows(task: str | None = None) -> list[Row]:
    """Rows of all tasks, or of one, in an order that depends on the Python version alone.

    Raises:
        DataError: unknown task, or the standard library's sources are not installed.
    """
    if task is not None and task not in STDLIB_LABELS:
        raise DataError(f"stdlib: unknown task {task!r}; tasks are {sorted(STDLIB_LABELS)}")
    return [dict(row) for row in _all_rows() if task in (None, row["task"])]


def sites(n: int = 3) -> dict[str, list[str]]:
    """``n`` sites and the clients whose rows each holds, neighbours in `HOLDS` together, so that tasks are spread unevenly.

    Raises:
        DataError: there are fewer clients than sites.
    """
    clients = list(HOLDS)
    if not 1 <= n <= len(clients):
        raise DataError(f"stdlib: {n} sites asked for; the embedded data has {len(clients)} clients, so give 1 to {len(clients)}")
    cuts = [round(number * len(clients) / n) for number in range(n + 1)]
    return {f"site-{number}": clients[start:end] for number, (start, end) in enumerate(pairwise(cuts), 1)}


@cache
def _all_rows() -> tuple[Row, ...]:
    documents, messages = scan()
    found = [*_labelled(documents), *(_row("error", item.client, item.text, item.error) for item in messages)]
    known = [row for row in found if row["label"] in STDLIB_LABELS[row["task"]] and row["task"] in HOLDS[row["client"]]]
    return tuple(row for task in STDLIB_LABELS for row in _capped(_once(row for row in known if row["task"] == task)))


def _labelled(documents: Iterable[Document]) -> Iterator[Row]:
    for item in documents:
        text = masked(item.text, item.name)
        yield _row("area", item.client, text, item.area)
        yield _row("kind", item.client, text, item.kind)
        if item.effect:
            yield _row("effect", item.client, text, item.effect)


def masked(text: str, name: str) -> str:
    """``text`` without the name of what it documents.

    >>> masked("Queue is a class; Queue(n) makes one.", "Queue")
    '… is a class; …(n) makes one.'
    """
    return re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", text) if name in text else text


def _row(task: str, client: str, text: str, label: str) -> Row:
    return {"task": task, "client": client, "split": "train", "text": f"{STDLIB_QUESTIONS[task]} {text}", "label": label}


def _once(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows with enough words, each text once, with their split; a text that stands under several labels says nothing and is left out."""
    labels: dict[str, set[str]] = {}
    first: dict[str, Row] = {}
    for row in rows:
        words = _words(row["text"].removeprefix(STDLIB_QUESTIONS[row["task"]]))
        labels.setdefault(words, set()).add(row["label"])
        first.setdefault(words, row)
    for words, row in first.items():
        if len(labels[words]) == 1 and words.count(" ") + 1 >= MIN_WORDS:
            yield row | {"split": split_of(words)}


def _capped(rows: Iterable[Row]) -> list[Row]:
    """At most `CAP` or `FEW` rows of each client and label, in their order."""
    listed = list(rows)
    kept: Counter[tuple[str, str]] = Counter()
    chosen = []
    for place in sorted(range(len(listed)), key=lambda place: position(listed[place]["text"])):
        row = listed[place]
        kept[row["client"], row["label"]] += 1
        if kept[row["client"], row["label"]] <= _most(row):
            chosen.append(place)
    return [listed[place] for place in sorted(chosen)]


def _most(row: Row) -> int:
    usual = USUAL.get((row["task"], row["client"]), (row["label"],))
    return CAP if row["label"] in usual else FEW


def _words(text: str) -> str:
    """The letters of a text alone: what decides whether two are the same."""
    return " ".join(re.findall(r"[a-z]{2,}", text.lower()))
