"""Mixtures on vision encoders: every image of a batch follows its own adapter, through windows and maps too."""

from __future__ import annotations

import pytest
import torch

from fedpeft.adapters import attach
from fedpeft.bases import BaseSpec, HeadSpec, load_base
from fedpeft.errors import AdapterError
from fedpeft.mixtures import Bank, Gates

TABLES = {
    "wide": {"kind": "lora", "r": 4, "targets": ["all"]},
    "gain": {"kind": "ia3"},
    "bottle": {"kind": "bottleneck", "dim": 5},
    "rs": {"kind": "lora", "r": 3, "rslora": True, "targets": ["mlp"]},
}
ROWS = ["wide", "gain", None, "bottle", "rs", "wide"]
HEAD = HeadSpec("classification", ("a", "b", "c"))


def near(found, wanted, tolerance=1e-5):
    assert float((found.detach() - wanted.detach()).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(("kind", "dense"), [("ViT", True), ("Swin", False), ("ConvNext", True)])
def test_a_mixed_batch_is_each_image_alone(vision_folder, make_adapter, kind, dense):
    base = load_base(BaseSpec(str(vision_folder(kind))), "cpu")
    adapters = {name: make_adapter(name, base, table, HEAD, seed) for seed, (name, table) in enumerate(TABLES.items())}
    assert base.processor is not None
    shape = (len(ROWS), 3, *base.processor.size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits, grads = {}, {}
    for name, adapter in adapters.items():
        rows = [row for row, own in enumerate(ROWS) if own == name]
        with attach(base, adapter.spec) as live:
            live.load(adapter.tensors)
            out = live.model(pixel_values=pixels[rows]).logits
            sum(row.square().mean() for row in out).backward()
            logits |= dict(zip(rows, out.detach(), strict=True))
            grads[name] = live.grad.clone()
    with Bank.attach(base, HEAD, adapters, dense=dense) as bank:
        bank.use(Gates.rows(ROWS))
        found = bank.model(pixel_values=pixels).logits
        sum(found[row].square().mean() for row, own in enumerate(ROWS) if own).backward()
        for row, wanted in logits.items():
            near(found[row], wanted)
        for name, wanted in grads.items():
            near(bank.grad(name), wanted, 1e-4)
        with pytest.raises(AdapterError, match="makes tokens of its own from images; give weights of rows"):
            bank.use(Gates.tokens(["wide"], torch.ones(6, 17, 1)))
