"""Tasks on encoder-decoders: transformers' own loss, filling that changes nothing, greedy text, choices, and ends that classifiers find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedpeft.bases import Base, BaseSpec, load_base
from fedpeft.tasks import Choice, Classification, Generation, Row
from fedpeft.tasks import likelihood as module
from fedpeft.tasks.chunked import head_of, whole_logits
from fedpeft.tasks.greedy import generate

TASK = Generation("tales", max_new_tokens=6, samples=8)
LABELS = Classification("kinds", ("a", "b", "c"))


def words(seed: int, count: int) -> str:
    return " ".join(f"w{n}" for n in np.random.default_rng(seed).integers(0, 60, count))


ROWS: list[Row] = [{"prompt": words(n, 2 + n % 7), "completion": words(50 + n, 1 + n % 4)} for n in range(12)]


@pytest.fixture(scope="module", params=["t5", "bart"])
def base(request: pytest.FixtureRequest, seq2seq_folder: Callable[[str], Path]) -> Base:
    return load_base(BaseSpec(str(seq2seq_folder(request.param)), max_tokens=16), "cpu")


def alone(model: Any, base: Base, row: Row) -> torch.Tensor:
    """transformers' own mean loss of one row without filling, in float64, of labels that its tokenizer makes."""
    asked, said = (base.tokenizer(row[name], return_tensors="pt").input_ids for name in ("prompt", "completion"))
    with torch.no_grad():
        logits = model(input_ids=asked, labels=said).logits[0].double()
    return F.cross_entropy(logits, said[0], reduction="none")


def test_the_loss_is_transformers_own(base: Base) -> None:
    model: Any = base.shell(TASK.head)
    data = TASK.encode(ROWS, base)
    batch = next(iter(TASK.batches(data, len(ROWS), 0, 0)))
    assert batch.inputs["input_ids"].shape[0] == batch.labels.shape[0] == batch.examples == len(ROWS)
    assert batch.tokens == sum(len(ids) for ids in data.ids)
    loss = TASK.loss(model, batch)
    with torch.no_grad():
        theirs = model(**{name: batch.inputs[name] for name in ("input_ids", "attention_mask")}, labels=batch.labels).loss
    assert float(loss.total.detach()) / loss.count == pytest.approx(float(theirs), rel=1e-5)
    wanted = torch.cat([alone(model, base, row) for row in ROWS])
    assert loss.count == len(wanted)
    assert float(loss.total.detach()) == pytest.approx(float(wanted.sum()), rel=1e-5)
    counters = TASK.evaluate(model, data, base)
    assert counters["loss"][0] == pytest.approx(float(wanted.sum()), rel=1e-5)
    assert {name: len(values) for name, values in counters.items()} == TASK.counted


def test_t5_makes_no_logits_and_its_gradients_are_those_of_whole_ones(base: Base) -> None:
    model: Any = base.shell(TASK.head)
    batch = next(iter(TASK.batches(TASK.encode(ROWS, base), 5, 0, 0)))
    assert (head_of(model) is None) == (base.config.model_type == "bart")  # a bias comes after its head
    weight = next(
        p for name, p in model.named_parameters() if name.endswith("layers.0.fc1.weight") or name.endswith("0.SelfAttention.q.weight")
    )
    with weight_trained(weight):
        (found,) = torch.autograd.grad(module.token_losses(model, batch).square().sum(), weight)
        with whole_logits():
            (wanted,) = torch.autograd.grad(module.token_losses(model, batch).square().sum(), weight)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert "forward" not in model.get_output_embeddings().__dict__


@contextmanager
def weight_trained(weight: torch.nn.Parameter) -> Iterator[None]:
    weight.requires_grad_()
    try:
        yield
    finally:
        weight.requires_grad_(False)


@settings(max_examples=8)
@given(
    places=st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=5), more=st.integers(0, 9), limit=st.sampled_from([1, 40, 10**6])
)
def test_filling_and_cutting_change_no_tokens_loss(base: Base, places: list[int], more: int, limit: int) -> None:
    model = base.shell(TASK.head)
    batch = module.batch_of(TASK.encode(ROWS, base), places, len(places))
    inputs = {name: F.pad(value, (0, more), value=batch.pad) for name, value in batch.inputs.items()}
    inputs["attention_mask"] = F.pad(batch.inputs["attention_mask"], (0, more), value=0)
    wide = replace(batch, inputs=inputs, labels=F.pad(batch.labels, (0, more), value=module.IGNORED))
    wanted = torch.cat([alone(model, base, ROWS[place]) for place in places]).float()
    before, module.PACK = module.PACK, limit
    try:
        torch.testing.assert_close(module.token_losses(model, wide), wanted, rtol=1e-4, atol=1e-5)
    finally:
        module.PACK = before
    assert module.owners(wide).tolist() == [row for row, place in enumerate(places) for _ in alone(model, base, ROWS[place])]


def test_greedy_text_is_step_by_step_argmax_however_prompts_are_batched(base: Base) -> None:
    model: Any = base.shell(TASK.head)
    data = TASK.encode(ROWS[:6], base)
    prompts = [ids[:start] for ids, start in zip(data.ids, data.starts, strict=True)]
    wanted = []
    for row in ROWS[:6]:
        asked, said = base.tokenizer(row["prompt"], return_tensors="pt").input_ids, [base.config.decoder_start_token_id]
        while len(said) < 7 and (len(said) == 1 or said[-1] != base.config.eos_token_id):
            with torch.no_grad():
                said.append(int(model(input_ids=asked, decoder_input_ids=torch.tensor([said])).logits[0, -1].argmax()))
        wanted.append(base.tokenizer.decode(said[1:], skip_special_tokens=True).strip())
    assert generate(model, base, prompts, 6) == wanted
    assert TASK.answer(model, base, ROWS[0]["prompt"]) == wanted[0]


def test_choice_takes_the_likeliest(base: Base) -> None:
    task, model = Choice("quiz"), base.shell(TASK.head)
    rows: list[Row] = [
        {"prompt": words(n, 4), "choices": [words(n + 7, 1), words(n + 8, 3), words(n + 9, 2)], "answer": 1} for n in range(5)
    ]
    means = [[float(alone(model, base, {"prompt": row["prompt"], "completion": one}).mean()) for one in row["choices"]] for row in rows]
    counters = task.evaluate(model, task.encode(rows, base), base)
    assert counters["correct"] == (float(sum(int(np.argmin(row)) == 1 for row in means)),)
    batch = next(iter(task.batches(task.encode(rows, base), 5, 0, 0)))
    assert float(task.loss(model, batch).total) == pytest.approx(counters["loss"][0], rel=1e-5)
    asked = "\n".join([rows[0]["prompt"], *(f"- {one}" for one in rows[0]["choices"])])
    assert task.answer(model, base, asked) == rows[0]["choices"][int(np.argmin(means[0]))]


def test_each_half_has_the_limit_to_itself(base: Base) -> None:
    data = TASK.encode([{"prompt": words(0, 40), "completion": words(1, 40)}], base)
    (batch,) = TASK.batches(data, 1, 0, 0)
    assert batch.inputs["input_ids"].shape == batch.labels.shape == (1, 16)
    assert batch.inputs["input_ids"][0, -1] == base.config.eos_token_id


def test_classified_texts_end_once_and_filling_changes_nothing(base: Base) -> None:
    rows = [
        {"text": words(0, 5), "label": "a"},
        {"text": f"{words(1, 2)} </s> {words(2, 1)}", "label": "b"},
        {"text": words(3, 40), "label": "c"},
    ]
    data = LABELS.encode(rows, base)
    assert [ids.tolist().count(base.config.eos_token_id) for ids in data.ids] == [1, 1, 1]
    assert all(len(ids) <= 16 and ids[-1] == base.config.eos_token_id for ids in data.ids)
    model = base.shell(LABELS.head)
    singly = sum(LABELS.evaluate(model, LABELS.encode([row], base), base)["loss"][0] for row in rows)
    assert LABELS.evaluate(model, data, base)["loss"][0] == pytest.approx(singly, rel=1e-5)
