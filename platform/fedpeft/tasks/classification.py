"""Classification: one label of a fixed list for a text, on any base that reads text, or for an image, on a vision base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedpeft.bases.images import text_of
from fedpeft.bases.spec import HeadSpec
from fedpeft.errors import DataError
from fedpeft.tasks import metrics as measures
from fedpeft.tasks.arrange import Places, bucketed, by_length
from fedpeft.tasks.encoding import ended, pad_id, token_limit
from fedpeft.tasks.forms import excerpt, field, text_label, value
from fedpeft.tasks.images import IMAGE, Images, has_image, source_of
from fedpeft.tasks.protocol import Batch, Encoded, Ids, Loss, Row

if TYPE_CHECKING:
    import torch

    from fedpeft.bases import Base

ALLOWED = ("accuracy", "macro_f1")
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Classification:
    """Rows ``{text, label}`` or ``{image, label}``; ``labels`` fixes the head's order of classes.

    ``text`` and ``label`` name other columns; an image is always in the column ``image``.
    """

    kind: ClassVar[str] = "classification"

    name: str
    labels: tuple[str, ...]
    text: str = "text"
    label: str = "label"
    metrics: tuple[str, ...] = ALLOWED

    def __post_init__(self) -> None:
        measures.check_metrics(self.metrics, ALLOWED, self.kind)
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"task {self.name}: labels are {list(self.labels)}; give two or more different ones")

    @property
    def head(self) -> HeadSpec:
        """A classifier over the labels."""
        return HeadSpec("classification", self.labels)

    @property
    def headline(self) -> str:
        """The first metric."""
        return self.metrics[0]

    def text_of(self, row: Row) -> str:
        """What routing embeds: a text, or what names or holds an image. Raises `DataError` when the row has neither."""
        if has_image(row) and row.get(self.text) is None:
            return text_of(source_of(row, 1))
        return field(row, self.text, 1)

    def encode(self, rows: Sequence[Row], base: Base) -> Encoded:
        """Tokenise texts, or read images once, and look labels up.

        Raises:
            DataError: an unknown label, a missing field, no row, a broken image, or texts where the base reads images and the reverse.
        """
        if not rows:
            raise DataError(f"task {self.name}: no rows; give the source rows of this split")
        inputs = [self._pair(row, number, base) for number, row in enumerate(rows, 1)]
        labels = np.array([self._index(number, *pair) for number, pair in enumerate(inputs, 1)], np.int64)
        return _encoded(base, [given for given, _ in inputs], labels)

    def batches(self, data: Encoded, size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """Length-bucketed and padded to the longest of the batch."""
        yield from (_batch(data, places) for places in bucketed(data.lengths, size, seed, epoch))

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Cross-entropy in nats, summed over the examples."""
        logits, labels = _logits(model, batch)
        return Loss(_cross_entropy(logits, labels), batch.examples)

    @property
    def counted(self) -> Mapping[str, int]:
        """One value each, but one a label of the last three."""
        labels = len(self.labels)
        return {"loss": 1, "count": 1, "examples": 1, "correct": 1, "tp": labels, "fp": labels, "fn": labels}

    def evaluate(self, model: torch.nn.Module, data: Encoded, base: Base) -> measures.Counters:
        """``loss``, ``count``, ``examples``, ``correct``, and per label ``tp``, ``fp``, ``fn``."""
        import torch

        total, truth, said = 0.0, [], []
        with torch.no_grad():
            for places in by_length(data.lengths, EVALUATION_BATCH):
                logits, labels = _logits(model, _batch(data, places))
                total += float(_cross_entropy(logits, labels))
                truth.append(labels.cpu().numpy())
                said.append(logits.argmax(1).cpu().numpy())
        counts = measures.confusion(np.concatenate(truth), np.concatenate(said), len(self.labels))
        return {"loss": (total,), "count": (float(len(data)),), **counts}

    def scores(self, counters: measures.Counters) -> dict[str, float]:
        """Metrics from counters."""
        return measures.scores(counters, self.metrics)

    def answer(self, model: torch.nn.Module, base: Base, text: str) -> str:
        """The most probable label and its probability."""
        import torch

        zero = np.zeros(1, np.int64)
        with torch.no_grad():
            logits, _ = _logits(model, _batch(_encoded(base, [text], zero), zero))
        shares = logits[0].softmax(0)
        best = int(shares.argmax())
        return f"{self.labels[best]} ({float(shares[best]):.0%})"

    def _pair(self, row: Row, number: int, base: Base) -> tuple[str | bytes, str]:
        """Text and label of row ``number``, or image and label."""
        if base.processor is not None:
            return _image(row, number, self.text), str(value(row, self.label, number))
        if has_image(row) and row.get(self.text) is None:
            raise DataError(
                f"row {number}: holds an image, and base {base.spec.model} reads text; give rows of text, or a vision base, such as a ViT"
            )
        return text_label(row, self.text, self.label, number)

    def _index(self, number: int, given: str | bytes, label: str) -> int:
        if label not in self.labels:
            allowed = list(self.labels[:12]) + (["..."] if len(self.labels) > 12 else [])
            raise DataError(
                f"task {self.name}, row {number} ({excerpt(given)}): unknown label {label!r}; allowed are {allowed}; "
                "correct the row, or leave such rows out with `where` beside the path"
            )
        return self.labels.index(label)


def _encoded(base: Base, inputs: Sequence[str | bytes], labels: Places) -> Encoded:
    """Texts as token ids, or images as their pixels."""
    zeros, owners = np.zeros(len(inputs), np.int64), np.arange(len(inputs))
    if base.processor is not None:
        return Encoded(Images.of(base.processor, inputs), labels, zeros, owners, 0, patches=base.processor.tokens)
    return Encoded(_tokenise(base, [str(text) for text in inputs]), labels, zeros, owners, pad_id(base))


def _image(row: Row, number: int, text: str) -> str | bytes:
    if not has_image(row):
        raise DataError(f"row {number}: has no image, and the base reads images; fields are {sorted(row)}; give {IMAGE!r}, or a text base")
    if row.get(text) is not None:
        raise DataError(
            f"row {number}: holds both {IMAGE!r} and {text!r}; a vision base reads images alone, so rename {text!r} away with `columns`"
        )
    return source_of(row, number)


def _tokenise(base: Base, texts: list[str]) -> tuple[Ids, ...]:
    found = base.tokenizer(texts, truncation=True, max_length=token_limit(base), padding=False)["input_ids"]
    found = [ended(base, ids) for ids in found] if base.family == "seq2seq" else found
    return tuple(np.asarray(ids or [pad_id(base)], np.int32) for ids in found)


def _batch(data: Encoded, places: Places) -> Batch:
    import torch

    from fedpeft.tasks.filled import inputs_of

    inputs = inputs_of([data.ids[place] for place in places], data.pad)
    tokens = int(data.lengths[places].sum())
    return Batch(inputs, torch.from_numpy(data.labels[places]), len(places), tokens, data.pad)


def _logits(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, K) in float32 and labels (B,) on the model's device."""
    from fedpeft.tasks.filled import device_of

    device = device_of(model)
    output = model(**{name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()})
    return output.logits.float(), batch.labels.to(device, non_blocking=True)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, labels, reduction="sum")
