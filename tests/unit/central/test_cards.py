"""Cards of a job's tasks: a text finds its task, a stranger the base; and a published version holds its card."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from fedpeft.bases import BaseSpec
from fedpeft.central import cards
from fedpeft.routing import Request, make_router
from fedpeft.tasks import Classification, Source

WIDTH = 16


@dataclass(frozen=True)
class Encoder:
    """Texts ``NUMBER:AXIS`` near an axis each."""

    encoder: str = "fake@1"
    width: int = WIDTH

    def embed(self, texts):
        made = np.zeros((len(texts), WIDTH), np.float32)
        for row, text in zip(made, texts, strict=True):
            number, axis = map(int, text.split(":"))
            row[:] = np.random.default_rng(number).normal(0.0, 0.15, WIDTH)
            row[axis] += 1.0
        return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_a_text_finds_its_task_and_a_stranger_the_base():
    encoder = Encoder()
    found = cards.cards({f"t{axis}": [f"{axis * 1000 + n}:{axis}" for n in range(200)] for axis in range(3)}, encoder)
    router = make_router("chain", found)
    said = {
        axis: [router.route(Request(embed=lambda text=f"{90000 + 100 * axis + n}:{axis}": encoder.embed([text])[0])) for n in range(50)]
        for axis in (0, 1, 2, 9)
    }
    for axis in range(3):
        assert sum(max(route.weights, key=route.weights.get, default="") == f"t{axis}" for route in said[axis]) >= 45
    assert sum(not route.weights for route in said[9]) >= 45


def test_one_row_has_a_card_and_none_has_none():
    found = cards.cards({"one": ["1:0"], "none": []}, Encoder())
    assert set(found) == {"one"}
    assert found["one"].card.count == 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_kept_comes_back_and_goes_onto_a_derived_card(tmp_path, stream):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n}:0", "label": "x"}) + "\n" for n in range(60)))
    entry = SimpleNamespace(task=Classification("a", ("x", "y")), data=Source(path=str(path)), stream=stream, cap=None)
    config = SimpleNamespace(output=tmp_path, tasks={"a": entry}, base=BaseSpec("fake"))
    cards.keep(config, Encoder())
    card = cards.kept(config, "a")
    assert card.card.encoder == "fake@1"
    assert cards.kept(config, "b") is None
    whole = cards.onto(cards.RouterCard(None, counts={"arrow": (1.0,)}), card)
    assert set(whole.counts) == {"arrow", "mahalanobis", "closeness.text"}
    assert whole.card == card.card
    assert cards.onto(whole, None) is whole


class Counting(Encoder):
    asked: ClassVar[list[int]] = []

    def embed(self, texts):
        self.asked.append(len(texts))
        return super().embed(texts)


def test_cards_are_made_once_for_the_same_texts_and_base_and_again_for_others(tmp_path):
    path, file = tmp_path / "rows.jsonl", tmp_path / "cards" / "a.safetensors"
    path.write_text("".join(json.dumps({"text": f"{n}:0", "label": "x"}) + "\n" for n in range(20)))
    entry = SimpleNamespace(task=Classification("a", ("x", "y")), data=Source(path=str(path)), stream=False, cap=None)
    config, encoder = SimpleNamespace(output=tmp_path, tasks={"a": entry}, base=BaseSpec("fake")), Counting()

    def made(*of: object) -> bool:
        before = len(Counting.asked)
        cards.keep(*of)
        return len(Counting.asked) > before

    assert made(config, encoder)
    first = file.read_bytes()
    assert not made(config, encoder)
    for changed in (
        (config, replace(encoder, encoder="fake@2")),
        (SimpleNamespace(**vars(config) | {"base": BaseSpec("fake", "nf4")}), encoder),
        (SimpleNamespace(**vars(config) | {"base": BaseSpec("fake", max_tokens=8)}), encoder),
        (SimpleNamespace(**vars(config) | {"tasks": {"a": SimpleNamespace(**vars(entry) | {"cap": 7})}}), encoder),
    ):
        assert made(*changed)
    assert made(config, encoder)
    assert file.read_bytes() == first
    file.unlink()
    assert made(config, encoder)
    (tmp_path / "cards" / cards.MADE).write_text("torn")
    assert made(config, encoder)
    path.write_text("".join(json.dumps({"text": f"{n}:1", "label": "y"}) + "\n" for n in range(20)))
    assert made(config, encoder)
