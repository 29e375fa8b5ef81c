"""Mixtures on encoder-decoders: rows of the encoder and of the decoder follow the same gates, forward and backward."""

from __future__ import annotations

import pytest
import torch

from fedpeft.adapters import attach
from fedpeft.bases import BaseSpec, HeadSpec, load_base
from fedpeft.errors import AdapterError
from fedpeft.mixtures import Bank, Gates

TABLES = {
    "wide": {"kind": "lora", "r": 4, "targets": ["all"]},
    "rs": {"kind": "lora", "r": 3, "rslora": True},
    "gain": {"kind": "ia3"},
    "bottle": {"kind": "bottleneck", "dim": 5},
    "moe": {"kind": "molora", "r": 2, "experts": 3, "top": 2},
    "twin": {"kind": "lora", "r": 4, "targets": ["all"]},
}
ROWS = ["wide", "gain", None, "bottle", "rs", "moe", "twin", "wide"]
HEADS = {"lm": HeadSpec("lm"), "classes": HeadSpec("classification", ("a", "b", "c"))}


def batch_for(head):
    generator = torch.Generator().manual_seed(0)
    ids, said = (torch.randint(4, 60, (len(ROWS), width), generator=generator) for width in (7, 4))
    lengths = torch.tensor([7, 4, 5, 7, 3, 6, 7, 2])[:, None]
    place = torch.arange(7)[None]
    ids = torch.where(place < lengths - 1, ids, torch.where(place == lengths - 1, 1, 0))
    return {"input_ids": ids, "attention_mask": (ids != 0).long()} | ({"decoder_input_ids": said} if head == "lm" else {})


@pytest.fixture(scope="module", params=["t5", "bart"])
def base(request, seq2seq_folder):
    return load_base(BaseSpec(str(seq2seq_folder(request.param)), max_tokens=32), "cpu")


def near(found, wanted, tolerance=1e-5):
    assert float((found.detach() - wanted.detach()).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(("head", "dense"), [("lm", False), ("classes", True)])
def test_a_mixed_batch_is_each_row_alone(base, make_adapter, head, dense):
    adapters = {name: make_adapter(name, base, table, HEADS[head], seed) for seed, (name, table) in enumerate(TABLES.items())}
    batch, logits, grads = batch_for(head), {}, {}
    for name, adapter in adapters.items():
        rows = [row for row, own in enumerate(ROWS) if own == name]
        with attach(base, adapter.spec) as live:
            live.load(adapter.tensors)
            out = live.model(**{key: value[rows] for key, value in batch.items()}).logits
            sum(row.square().mean() for row in out).backward()
            logits |= dict(zip(rows, out.detach(), strict=True))
            grads[name] = live.grad.clone()
    with Bank.attach(base, HEADS[head], adapters, dense=dense) as bank:
        bank.use(Gates.rows(ROWS))
        found = bank.model(**batch).logits
        sum(found[row].square().mean() for row, own in enumerate(ROWS) if own).backward()
        for row, wanted in logits.items():
            near(found[row], wanted)
        for name, wanted in grads.items():
            near(bank.grad(name), wanted, 1e-4)


def test_gates_of_rows_reach_what_is_generated_and_those_of_tokens_are_refused(base, make_adapter):
    adapters = {name: make_adapter(name, base, TABLES[name], HEADS["lm"], seed) for seed, name in enumerate(("wide", "twin"))}
    batch, said = batch_for("lm"), {}
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 1}
    del batch["decoder_input_ids"]
    for name, adapter in adapters.items():
        with attach(base, adapter.spec) as live:
            live.load(adapter.tensors)
            said[name] = live.model.eval().generate(**batch, **settings)
    rows = ["wide", "twin"] * 4
    with Bank.attach(base, HEADS["lm"], adapters) as bank:
        bank.use(Gates.rows(rows))
        found = bank.model.eval().generate(**batch, **settings)
        assert found.tolist() == [said[name][row].tolist() for row, name in enumerate(rows)]
        with pytest.raises(AdapterError, match="reads tokens in its encoder and others in its decoder"):
            bank.use(Gates.tokens(["wide"], torch.ones(8, 7, 1)))
