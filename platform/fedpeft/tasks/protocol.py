"""What a task must answer, and the values that pass between a task and the training loop; no torch at import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from fedpeft.bases import Base, HeadSpec
    from fedpeft.tasks.metrics import Counters

Row = dict[str, Any]
Ids = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Encoded:
    """N examples, tokenised once.

    Attributes:
        ids: S token sequences; S is N, but for multiple choice, where every choice of an example is a sequence. Or N images' pixels.
        labels: (N,) class index (classification) or index into ``ids`` of the sequence to learn.
        starts: (S,) position of the first token that carries loss; 0 for classification.
        owners: (S,) the example that each sequence belongs to.
        pad: token id that fills up shorter sequences.
        references: (N,) the expected text, where generated text is compared with it.
        patches: tokens that a vision trunk makes of each image; 0: ``ids`` are tokens.
        paired: an encoder reads up to the last token before ``starts``, which is the decoder's first; False: one model reads all.
    """

    ids: Sequence[NDArray[Any]]
    labels: NDArray[np.int64]
    starts: NDArray[np.int64]
    owners: NDArray[np.int64]
    pad: int
    references: tuple[str, ...] = ()
    paired: bool = False
    patches: int = 0

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence (S,); no image is read for it."""
        return np.full(len(self.ids), self.patches) if self.patches else np.array([len(ids) for ids in self.ids], np.int64)


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward needs, on the CPU; `Task.loss` moves it to the model's device.

    Classification: ``input_ids`` and ``attention_mask`` (B, T), or of images ``pixel_values`` (B, 3, H, W) in bytes; ``labels`` (B,).
    Causal language models: sequences one after the other, ``input_ids`` and ``position_ids`` (1, N) with positions restarting at 0,
    and ``labels`` (1, N): the token to predict at each position, already shifted, -100 where none is. Encoder-decoders:
    ``input_ids`` and ``attention_mask`` (B, T) of the encoder, ``decoder_input_ids`` and ``labels`` (B, U), -100 where the row is over.
    """

    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor
    examples: int
    tokens: int
    pad: int = 0


@dataclass(frozen=True, eq=False)
class Loss:
    """Cross-entropy in nats, summed (not averaged) over ``count`` terms: examples, or labelled tokens."""

    total: torch.Tensor
    count: int


class Task(Protocol):
    """How rows become examples, what is learnt from them, and how answers are scored."""

    kind: ClassVar[str]

    @property
    def name(self) -> str:
        """The task's name in the federation."""
        ...

    @property
    def head(self) -> HeadSpec:
        """The head it needs on the base."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `scores` gives."""
        ...

    @property
    def headline(self) -> str:
        """The one metric that tables show; higher is better, but for perplexity."""
        ...

    def text_of(self, row: Row) -> str:
        """The part of a row that a request consists of: what routing embeds. Raises `DataError` on an unknown form."""
        ...

    def encode(self, rows: Sequence[Row], base: Base) -> Encoded:
        """Tokenise rows, or read their images.

        Raises:
            DataError: a row is not what it must be; it is named, the value, and what is allowed.
            BaseError: the base is of the wrong family.
        """
        ...

    def batches(self, data: Encoded, size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """One pass over ``data`` in an order that depends on (seed, epoch) alone; ``size`` examples a batch, the last may be smaller."""
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """The summed training loss of one batch."""
        ...

    @property
    def counted(self) -> Mapping[str, int]:
        """Names of the counters that `evaluate` gives, whatever the rows, and how many values each has."""
        ...

    def evaluate(self, model: torch.nn.Module, data: Encoded, base: Base) -> Counters:
        """Counters as sums, so that adding those of two sites gives those of their union."""
        ...

    def scores(self, counters: Counters) -> dict[str, float]:
        """Metrics from counters."""
        ...

    def answer(self, model: torch.nn.Module, base: Base, text: str) -> str:
        """One answer for a person."""
        ...
