"""Multiple choice by likelihood: the answer is the choice that the language model finds most likely after the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.bases.spec import HeadSpec
from fedpeft.errors import DataError
from fedpeft.tasks import metrics as measures
from fedpeft.tasks.arrange import shuffled
from fedpeft.tasks.encoding import encode_pair, pad_id, require_writer
from fedpeft.tasks.forms import Pair, Question, question
from fedpeft.tasks.protocol import Batch, Encoded, Loss, Row

if TYPE_CHECKING:
    import torch

    from fedpeft.bases import Base

ALLOWED = ("accuracy", "perplexity")
EVALUATION_BATCH = 8


@dataclass(frozen=True)
class Choice:
    """Rows ``{prompt, choices, answer}``; training raises the likelihood of the right choice.

    ``normalised`` compares the mean log-likelihood per token, so that long choices are not at a disadvantage; otherwise the sum.
    """

    kind: ClassVar[str] = "choice"

    name: str
    metrics: tuple[str, ...] = ("accuracy",)
    normalised: bool = True

    def __post_init__(self) -> None:
        measures.check_metrics(self.metrics, ALLOWED, self.kind)

    @property
    def head(self) -> HeadSpec:
        """The language model's own head."""
        return HeadSpec("lm")

    @property
    def headline(self) -> str:
        """The first metric."""
        return self.metrics[0]

    def text_of(self, row: Row) -> str:
        """What routing embeds. Raises `DataError` when the row has none."""
        return question(row, 1).prompt

    def encode(self, rows: Sequence[Row], base: Base) -> Encoded:
        """Tokenise the prompt with every choice. Raises `DataError` on a wrong form or no row, `BaseError` unless the base writes."""
        require_writer(base, f"task {self.name}")
        if not rows:
            raise DataError(f"task {self.name}: no rows; give the source rows of this split")
        return _encoded([question(row, number) for number, row in enumerate(rows, 1)], base)

    def batches(self, data: Encoded, size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """The right choices of ``size`` examples, in the form of the base's family."""
        from fedpeft.tasks.likelihood import batch_of

        for places in shuffled(len(data), size, seed, epoch):
            yield batch_of(data, data.labels[places].tolist(), len(places))

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Cross-entropy in nats of the right choice's tokens, summed."""
        from fedpeft.tasks.likelihood import token_losses

        losses = token_losses(model, batch)
        return Loss(losses.sum(), len(losses))

    @property
    def counted(self) -> Mapping[str, int]:
        """One value each."""
        return dict.fromkeys(("loss", "count", "examples", "correct"), 1)

    def evaluate(self, model: torch.nn.Module, data: Encoded, base: Base) -> measures.Counters:
        """``loss`` over ``count`` tokens of the right choices, ``examples`` and ``correct``."""
        sums, counts = _likelihoods(model, data)
        values = sums / np.maximum(counts, 1) if self.normalised else sums
        best = [_first_lowest(values, np.flatnonzero(data.owners == place)) for place in range(len(data))]
        right = np.array(best) == data.labels
        return {
            "loss": (float(sums[data.labels].sum()),),
            "count": (float(counts[data.labels].sum()),),
            "examples": (float(len(data)),),
            "correct": (float(right.sum()),),
        }

    def scores(self, counters: measures.Counters) -> dict[str, float]:
        """Metrics from counters."""
        return measures.scores(counters, self.metrics)

    def answer(self, model: torch.nn.Module, base: Base, text: str) -> str:
        """The likeliest of the choices that stand at the end of ``text``, one a line, each after a dash.

        Raises:
            DataError: ``text`` ends in fewer than two such lines.
        """
        prompt, choices = _read(text)
        data = _encoded([Question(prompt, choices, 0)], base)
        sums, counts = _likelihoods(model, data)
        return choices[int((sums / np.maximum(counts, 1) if self.normalised else sums).argmin())]


def _encoded(questions: Sequence[Question], base: Base) -> Encoded:
    encoded = [encode_pair(base, Pair(asked.prompt, choice)) for asked in questions for choice in asked.choices]
    widths = np.array([len(asked.choices) for asked in questions])
    firsts = np.cumsum(widths) - widths
    labels = firsts + np.array([asked.answer for asked in questions])
    starts = np.array([start for _, start in encoded], np.int64)
    ids, owners = tuple(ids for ids, _ in encoded), np.repeat(np.arange(len(questions)), widths)
    return Encoded(ids, labels, starts, owners, pad_id(base), paired=base.family == "seq2seq")


def _likelihoods(model: torch.nn.Module, data: Encoded) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Negative log-likelihood in nats and number of tokens of every choice (S,)."""
    import torch

    from fedpeft.tasks.likelihood import batch_of, owners, token_losses

    sums, counts = np.zeros(len(data.ids)), np.zeros(len(data.ids), np.int64)
    with torch.no_grad():
        for start in range(0, len(data.ids), EVALUATION_BATCH):
            batch = batch_of(data, range(start, min(start + EVALUATION_BATCH, len(data.ids))), 0)
            sequences = owners(batch).numpy() + start
            np.add.at(sums, sequences, token_losses(model, batch).double().cpu().numpy())
            np.add.at(counts, sequences, 1)
    return sums, counts


def _first_lowest(values: NDArray[np.float64], places: NDArray[np.int64]) -> int:
    return int(places[values[places].argmin()])


def _read(text: str) -> tuple[str, tuple[str, ...]]:
    lines = text.rstrip().split("\n")
    place = next((place for place in range(len(lines), 0, -1) if not lines[place - 1].startswith("- ")), 0)
    choices = tuple(line[2:].strip() for line in lines[place:])
    if len(choices) < 2:
        raise DataError('choice: the text ends in no list of choices; write the question, then two or more lines that start with "- "')
    return "\n".join(lines[:place]), choices
