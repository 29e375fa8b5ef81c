"""Texts answered in one forward: embeddings, labels, choices, each batch with its own mixture in every row.

Shape suffixes: N rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from fedpeft.bases.encoders import Bare, Encoder
from fedpeft.bases.vision import tokens_of
from fedpeft.bases.watch import states
from fedpeft.errors import AdapterError, DataError, FedpeftError
from fedpeft.routing import Request, Route, Router, RouterCard, make_router
from fedpeft.routing.cards import common_encoder
from fedpeft.serving.bank import Bank, gates
from fedpeft.serving.heads import Heads
from fedpeft.serving.requests import Mixture

if TYPE_CHECKING:
    from fedpeft.bases import Base
    from fedpeft.tasks import Task

BATCH_TOKENS = 4096
"""Padded tokens of one forward."""


@dataclass(frozen=True, eq=False)
class Seen:
    """An image in the place of a text's tokens: its pixels (3, H, W), and how many tokens the trunk makes of it."""

    pixels: NDArray[np.uint8]
    tokens: int

    def __len__(self) -> int:
        return self.tokens


@dataclass(frozen=True)
class Text:
    """Token ids, or an image, under a mixture; ``labels`` where the row is to be classified by the head of the mixture's first adapter."""

    ids: tuple[int, ...] | Seen
    mixture: Mixture
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """A text for a task that answers for itself, under a mixture."""

    text: str
    mixture: Mixture
    task: Task


@dataclass(frozen=True)
class Routing:
    """A router over cards, the encoder that embeds for it, and the modules whose inputs it may look at."""

    router: Router
    encoder: Encoder
    named: str
    modules: tuple[str, ...]

    @staticmethod
    def over(kind: str, cards: Mapping[str, RouterCard], base: Base) -> Routing:
        """The router ``kind``. Raises `AdapterError` when the cards lack what it needs, `BaseError` when their encoder is not here."""
        from fedpeft.bases import load_encoder

        named = common_encoder({name: card.card for name, card in cards.items() if card.card is not None})
        modules = tuple(sorted({module for card in cards.values() for module in card.watched}))
        return Routing(make_router(kind, cards), load_encoder(named, Bare(base)), named, modules)


class Oneshots:
    """The work that `Engine.ask` batches; all of it runs on the engine's thread."""

    def __init__(self, base: Base, bank: Bank, heads: Heads) -> None:
        self._base, self._bank, self._heads = base, bank, heads

    def embed(self, texts: Sequence[Text]) -> list[NDArray[np.float32]]:
        """Mean of the last hidden state over a text's tokens, of length 1 (D,): what `Base.embed` gives, under each row's mixture."""
        return self._batched(texts, self._embed)

    def classify(self, texts: Sequence[Text]) -> list[dict[str, float]]:
        """Label -> probability, for each text."""
        return self._batched(texts, self._classify)

    def route(self, asked: Sequence[tuple[str, Routing]]) -> list[Route | FedpeftError]:
        """Where each text goes; what a router looks at is computed when it does, on the bare base."""
        self._bank.use(gates([]))
        return [self._route(text, routing) for text, routing in asked]

    def _route(self, text: str, routing: Routing) -> Route | FedpeftError:
        request = Request(
            None, lambda: routing.encoder.embed([text])[0], lambda: states(self._base, text, routing.modules), routing.named, text
        )
        try:
            return routing.router.route(request)
        except (AdapterError, DataError) as fault:
            return fault

    def answer(self, questions: Sequence[Question]) -> list[str | FedpeftError]:
        """What each task says, one after the other; a question that its task cannot read is answered by its fault."""
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> str | FedpeftError:
        self._bank.use(gates([question.mixture]))
        try:
            return question.task.answer(self._bank.model, self._base, question.text)
        except DataError as fault:
            return fault

    def _batched(self, texts: Sequence[Text], work: Any) -> list[Any]:
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place].ids))
        found: list[Any] = [None] * len(texts)
        while order:
            size = max(1, BATCH_TOKENS // max(len(texts[order[0]].ids), 1))
            places, order = order[:size], order[size:]
            for place, answer in zip(places, work([texts[place] for place in places]), strict=True):
                found[place] = answer
        return found

    def _embed(self, texts: list[Text]) -> list[NDArray[np.float32]]:
        inputs = self._inputs(texts)
        hidden = tokens_of(self._forward(texts, self._base.reader, inputs).last_hidden_state).float()
        mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2], device=hidden.device)).float()
        mean = torch.einsum("ntd,nt->nd", hidden, mask) / mask.sum(1, keepdim=True)
        return list(normalize(mean).cpu().numpy())

    def _classify(self, texts: list[Text]) -> list[dict[str, float]]:
        inputs = self._inputs(texts)
        model: Any = self._base.model
        paired = self._base.family == "seq2seq"
        said = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(inputs["input_ids"])} if paired else {}
        output = self._forward(texts, self._base.trunk, inputs | said)
        logits = self._heads.logits(output, inputs, [next(iter(text.mixture)) for text in texts])
        return [dict(zip(text.labels, row.softmax(0).tolist(), strict=True)) for text, row in zip(texts, logits, strict=True)]

    def _inputs(self, texts: list[Text]) -> dict[str, Tensor]:
        """Ids and mask (N, T), or pixels."""
        images = [text.ids.pixels for text in texts if isinstance(text.ids, Seen)]
        if images:
            return {"pixel_values": torch.from_numpy(np.stack(images)).to(self._base.device)}
        pad = int(self._base.tokenizer.pad_token_id)
        width = max(len(text.ids) for text in texts)
        ids = torch.tensor([[*cast(tuple[int, ...], text.ids), *[pad] * (width - len(text.ids))] for text in texts])
        mask = (torch.arange(width) < torch.tensor([len(text.ids) for text in texts])[:, None]).long()
        return {"input_ids": ids.to(self._base.device), "attention_mask": mask.to(self._base.device)}

    @torch.no_grad()
    def _forward(self, texts: list[Text], part: Any, inputs: Mapping[str, Tensor]) -> Any:
        """What a part of the model says to all rows, each under its mixture."""
        self._bank.use(gates([text.mixture for text in texts]))
        return part(**inputs)
