"""Generation: fine-tuning on completions only, scored by ROUGE-L, exact match and perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedpeft.bases.spec import HeadSpec
from fedpeft.errors import DataError
from fedpeft.tasks import metrics as measures
from fedpeft.tasks.arrange import by_length, shuffled
from fedpeft.tasks.encoding import encode_pair, opening, pad_id, require_writer
from fedpeft.tasks.forms import Pair, pairs, request
from fedpeft.tasks.protocol import Batch, Encoded, Loss, Row

if TYPE_CHECKING:
    import torch

    from fedpeft.bases import Base

ALLOWED = ("rouge_l", "exact_match", "perplexity")
EVALUATION_BATCH = 16


@dataclass(frozen=True)
class Generation:
    """Rows of any form with a prompt and a completion; only the completion carries loss.

    ``chat`` puts plain prompts through the tokenizer's chat template too (rows of ``messages`` always are);
    answers are generated greedily up to ``max_new_tokens``, in evaluation for ``samples`` examples at most.
    """

    kind: ClassVar[str] = "generation"

    name: str
    metrics: tuple[str, ...] = ALLOWED
    chat: bool = False
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    samples: Annotated[int, Field(ge=1)] = 64

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
        return request(row)

    def encode(self, rows: Sequence[Row], base: Base) -> Encoded:
        """Tokenise prompts and completions. Raises `DataError` on an unknown form or no row, `BaseError` unless the base writes text."""
        require_writer(base, f"task {self.name}")
        found = [self._form(pair) for number, row in enumerate(rows, 1) for pair in pairs(row, number)]
        if not found:
            raise DataError(f"task {self.name}: no rows; give the source rows of this split")
        encoded = [encode_pair(base, pair) for pair in found]
        places = np.arange(len(found))
        starts = np.array([start for _, start in encoded], np.int64)
        ids, said = tuple(ids for ids, _ in encoded), tuple(pair.completion for pair in found)
        return Encoded(ids, places, starts, places, pad_id(base), said, paired=base.family == "seq2seq")

    def batches(self, data: Encoded, size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """``size`` examples at a time, in the form of the base's family."""
        from fedpeft.tasks.likelihood import batch_of

        yield from (batch_of(data, places.tolist(), len(places)) for places in shuffled(len(data), size, seed, epoch))

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Cross-entropy in nats, summed over the labelled tokens."""
        from fedpeft.tasks.likelihood import token_losses

        losses = token_losses(model, batch)
        return Loss(losses.sum(), len(losses))

    @property
    def counted(self) -> Mapping[str, int]:
        """One value each; those of generated text only where a metric asks for them."""
        return dict.fromkeys(("loss", "count", "examples", *(("exact", "rouge", "generated") if self._generates else ())), 1)

    @property
    def _generates(self) -> bool:
        return bool({"rouge_l", "exact_match"} & set(self.metrics))

    def evaluate(self, model: torch.nn.Module, data: Encoded, base: Base) -> measures.Counters:
        """``loss`` over ``count`` labelled tokens, ``examples``; and ``exact``, ``rouge``, ``generated`` where a metric asks for them."""
        import torch

        from fedpeft.tasks.likelihood import batch_of

        total, count = 0.0, 0
        with torch.no_grad():
            for places in by_length(np.array([len(ids) for ids in data.ids]), EVALUATION_BATCH):
                loss = self.loss(model, batch_of(data, places.tolist(), len(places)))
                total, count = total + float(loss.total), count + loss.count
        counters = {"loss": (total,), "count": (float(count),), "examples": (float(len(data)),)}
        return counters | (self._texts(model, data, base) if self._generates else {})

    def scores(self, counters: measures.Counters) -> dict[str, float]:
        """Metrics from counters."""
        return measures.scores(counters, self.metrics)

    def answer(self, model: torch.nn.Module, base: Base, text: str) -> str:
        """The greedy answer to a prompt."""
        from fedpeft.tasks.greedy import generate

        return generate(model, base, [opening(base, self._form(Pair(text, "")).prompt)], self.max_new_tokens)[0]

    def _texts(self, model: torch.nn.Module, data: Encoded, base: Base) -> dict[str, tuple[float, ...]]:
        from fedpeft.tasks.greedy import generate

        places = range(min(len(data), self.samples))
        prompts = [data.ids[place][: data.starts[place]] for place in places]
        said = generate(model, base, prompts, self.max_new_tokens)
        return dict(measures.text_counters(said, [data.references[place] for place in places]))

    def _form(self, pair: Pair) -> Pair:
        if self.chat and isinstance(pair.prompt, str):
            return Pair([{"role": "user", "content": pair.prompt}], pair.completion)
        return pair
