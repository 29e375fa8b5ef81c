"""Classification: order, padding, loss and counters against the obvious computation, one text at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fedpeft.bases import Base
from fedpeft.config import build, describe
from fedpeft.errors import DataError
from fedpeft.tasks import TASKS, Batch, Classification, Encoded
from fedpeft.tasks.arrange import WINDOW, bucketed, by_length, shuffled

TASK = Classification("tone", ("bad", "good"))
ROWS = [
    {"text": " ".join(["a", "plain", "long", "word"][: 1 + n % 4] * (1 + n % 7)) + f" {n}", "label": ("bad", "good")[n % 3 == 0]}
    for n in range(70)
]


@pytest.fixture(scope="module", params=["encoder", "stories"])
def setting(request: pytest.FixtureRequest) -> tuple[Base, torch.nn.Module, Encoded]:
    base: Base = request.getfixturevalue(request.param)
    torch.manual_seed(1)
    return base, base.shell(TASK.head), TASK.encode(ROWS, base)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=300)


@given(lengths, st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 50))
def test_every_order_is_a_permutation_in_batches_of_the_size(sizes: list[int], size: int, seed: int, epoch: int) -> None:
    counts = np.array(sizes)
    for batches in (
        list(bucketed(counts, size, seed, epoch)),
        list(shuffled(len(counts), size, seed, epoch)),
        list(by_length(counts, size)),
    ):
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(counts)))
        assert all(len(batch) <= size for batch in batches)
        assert len(batches) <= -(-len(counts) // size) + len(counts) // (size * WINDOW)
    again = [batch.tolist() for batch in bucketed(counts, size, seed, epoch)]
    assert again == [batch.tolist() for batch in bucketed(counts, size, seed, epoch)]


def test_buckets_pad_less_than_a_plain_shuffle_and_epochs_differ() -> None:
    counts = np.random.default_rng(0).lognormal(3, 0.7, 2000).astype(np.int64) + 1
    filled = {
        order: sum(int(counts[b].max()) * len(b) for b in order(counts))
        for order in (lambda c: bucketed(c, 16, 0, 0), lambda c: shuffled(len(c), 16, 0, 0))
    }
    tight, loose = (counts.sum() / cells for cells in filled.values())
    assert tight > 0.9 > loose
    assert [b.tolist() for b in bucketed(counts, 16, 0, 0)] != [b.tolist() for b in bucketed(counts, 16, 0, 1)]
    assert [b.tolist() for b in bucketed(counts, 16, 0, 0)] != [b.tolist() for b in bucketed(counts, 16, 1, 0)]


def test_batches_hold_every_example_once_and_are_the_same_again(setting: tuple[Base, torch.nn.Module, Encoded]) -> None:
    base, _, data = setting

    def flat(seed: int, epoch: int) -> list[list[int]]:
        return [
            ids[mask.bool()].tolist()
            for batch in TASK.batches(data, 8, seed, epoch)
            for ids, mask in zip(*batch.inputs.values(), strict=True)
        ]

    assert sorted(flat(0, 0)) == sorted(ids.tolist() for ids in data.ids)
    assert flat(0, 0) == flat(0, 0) != flat(0, 1)
    assert sum(batch.examples for batch in TASK.batches(data, 8, 0, 0)) == len(data) == len(ROWS)
    assert sum(batch.tokens for batch in TASK.batches(data, 8, 0, 0)) == sum(len(ids) for ids in data.ids)
    first = next(iter(TASK.batches(data, 8, 0, 0)))
    assert first.inputs["input_ids"].shape[1] == max(first.inputs["attention_mask"].sum(1))
    assert data.pad == base.tokenizer.pad_token_id


def test_loss_and_counters_equal_one_text_at_a_time(setting: tuple[Base, torch.nn.Module, Encoded]) -> None:
    base, model, data = setting
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.from_numpy(ids).long()[None]).logits for ids in data.ids]).double()
        losses = [TASK.loss(model, batch) for batch in TASK.batches(data, 8, 3, 0)]
    wanted = float(cross_entropy(logits, torch.from_numpy(data.labels), reduction="sum"))
    assert float(sum(loss.total for loss in losses)) == pytest.approx(wanted, rel=1e-5)
    assert sum(loss.count for loss in losses) == len(ROWS)

    counters = TASK.evaluate(model, data, base)
    said = logits.argmax(1).numpy()
    assert counters["loss"][0] == pytest.approx(wanted, rel=1e-5)
    assert counters["count"] == counters["examples"] == (float(len(ROWS)),)
    assert counters["correct"] == (float((said == data.labels).sum()),)
    assert counters["tp"] == tuple(float(((said == k) & (data.labels == k)).sum()) for k in range(2))
    assert set(TASK.scores(counters)) == set(TASK.metrics)
    assert {name: len(values) for name, values in counters.items()} == TASK.counted


def test_answer_is_the_likeliest_label_with_its_share(minilm: Base) -> None:
    model = minilm.shell(TASK.head)
    with torch.no_grad():
        ids = minilm.tokenizer("good news", return_tensors="pt")
        shares = model(**ids).logits[0].softmax(0)
    best = int(shares.argmax())
    assert TASK.answer(model, minilm, "good news") == f"{TASK.labels[best]} ({float(shares[best]):.0%})"


def test_a_few_steps_on_the_head_lower_the_loss(minilm: Base) -> None:
    model = minilm.shell(TASK.head)
    rows = [{"text": text, "label": label} for text, label in [("wonderful, I love it", "good"), ("awful and boring", "bad")] * 8]
    data = TASK.encode(rows, minilm)
    head = [p.requires_grad_() for name, p in model.named_parameters() if name.startswith("classifier")]
    optimizer = torch.optim.AdamW(head, lr=0.05)
    before = TASK.evaluate(model, data, minilm)["loss"][0]
    for epoch in range(4):
        for batch in TASK.batches(data, 8, 0, epoch):
            loss: Batch | object = TASK.loss(model, batch)
            optimizer.zero_grad()
            loss.total.backward()  # type: ignore[attr-defined]
            optimizer.step()
    assert TASK.evaluate(model, data, minilm)["loss"][0] < before / 2
    assert TASK.answer(model, minilm, "I love it").startswith("good")


def test_unknown_labels_missing_fields_and_no_rows(minilm: Base) -> None:
    with pytest.raises(DataError, match=r"task tone, row 2 \('ok'\): unknown label 'meh'; allowed are \['bad', 'good'\]"):
        TASK.encode([{"text": "fine", "label": "good"}, {"text": "ok", "label": "meh"}], minilm)
    with pytest.raises(DataError, match=r"row 1: no field 'label'; fields seen are \['text'\]"):
        TASK.encode([{"text": "fine"}], minilm)
    with pytest.raises(DataError, match="task tone: no rows"):
        TASK.encode([], minilm)


def test_long_texts_are_cut_to_the_bases_limit(minilm: Base) -> None:
    data = TASK.encode([{"text": "word " * 500, "label": "bad"}], minilm)
    assert len(data.ids[0]) == minilm.spec.max_tokens


def test_tasks_are_built_from_a_table_and_described_back() -> None:
    table = {"kind": "classification", "name": "t", "labels": ["a", "b"], "metrics": ["macro_f1"]}
    task = build(TASKS, table, "task")
    assert task == Classification("t", ("a", "b"), metrics=("macro_f1",))
    assert task.headline == "macro_f1"
    assert build(TASKS, describe(task), "task") == task
    with pytest.raises(ValueError, match=r"unknown keys \['lables'\]; known keys are \['name', 'labels'"):
        build(TASKS, {"kind": "classification", "lables": []}, "task")
    with pytest.raises(ValueError, match="two or more different ones"):
        build(TASKS, {"kind": "classification", "name": "t", "labels": ["a", "a"]}, "task")
    with pytest.raises(ValueError, match=r"metrics \['bleu'\] cannot be computed"):
        build(TASKS, {"kind": "generation", "name": "t", "metrics": ["bleu"]}, "task")
