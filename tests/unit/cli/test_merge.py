"""`fedpeft adapters merge`: folders in, one folder out, the loss said; wrong input is one line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedpeft.adapters import Adapter, AdapterSpec, load, save
from fedpeft.bases.spec import HeadSpec
from fedpeft.cli.main import run
from fedpeft.errors import AdapterError, ConfigError
from fedpeft.methods import METHODS
from fedpeft.tensors import Entry, Layout, Tensors

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
LAYOUT = Layout.of([Entry("A", f"{LAYER}.lora_A.weight", (2, 6)), Entry("B", f"{LAYER}.lora_B.weight", (5, 2))])


@pytest.fixture
def folders(tmp_path):
    """Two random LoRA adapters of one base."""
    for seed in (0, 1):
        spec = AdapterSpec(f"t{seed}", "f" * 64, "tiny", METHODS["lora"](r=2, targets=("q_proj",)), HeadSpec("lm"), LAYOUT)
        values = np.random.default_rng(seed).standard_normal(LAYOUT.size).astype(np.float32)
        save(Adapter(spec, Tensors(LAYOUT, values)), tmp_path / str(seed))
    return [str(tmp_path / "0"), str(tmp_path / "1")]


def change(folder):
    named = load(folder).tensors.named()
    return named[f"{LAYER}.lora_B.weight"].astype(float) @ named[f"{LAYER}.lora_A.weight"].astype(float)


def test_cat_is_the_weighted_sum_of_products(folders, tmp_path, capsys):
    out = tmp_path / "both"
    weighted = [f"{folder}={share}" for folder, share in zip(folders, (0.25, 0.75), strict=True)]
    assert run(["adapters", "merge", *weighted, "--out", str(out), "--how", "cat"]) == 0
    assert np.allclose(change(out), 0.25 * change(tmp_path / "0") + 0.75 * change(tmp_path / "1"), atol=1e-6)
    assert "0.00% of the energy" in capsys.readouterr().out


def test_svd_says_what_its_rank_lost(folders, tmp_path, capsys):
    out = tmp_path / "both"
    assert run(["adapters", "merge", *folders, "--out", str(out), "--how", "svd", "--set", "rank=1"]) == 0
    values = np.linalg.svd(0.5 * change(tmp_path / "0") + 0.5 * change(tmp_path / "1"), compute_uv=False)
    lost = (values[1:] ** 2).sum() / (values**2).sum()
    assert f"{lost:.2%} of the energy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--how", "linear"], ConfigError.exit_code, "A and B apart"),
        (["--how", "mean"], ConfigError.exit_code, "known kinds"),
        (["--set", "rank"], ConfigError.exit_code, "rank=16"),
        (["--set", "range=3"], ConfigError.exit_code, "known keys"),
        (["nowhere=0.5"], AdapterError.exit_code, "no registry here"),
    ],
)
def test_wrong_input_is_one_line(arguments, code, words, folders, tmp_path, capsys):
    assert run(["adapters", "merge", *folders, "--out", str(tmp_path / "x"), *arguments]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_clusters_are_told_and_merged(tmp_path, capsys):
    """Two pairs of near copies: two clusters, each merged to its mean product."""
    rng, folders = np.random.default_rng(5), []
    for place in range(4):
        if place % 2 == 0:
            centre = rng.standard_normal(LAYOUT.size)
        spec = AdapterSpec(f"t{place}", "f" * 64, "tiny", METHODS["lora"](r=2, targets=("q_proj",)), HeadSpec("lm"), LAYOUT)
        values = (centre + 0.05 * rng.standard_normal(LAYOUT.size)).astype(np.float32)
        save(Adapter(spec, Tensors(LAYOUT, values)), tmp_path / str(place))
        folders.append(str(tmp_path / str(place)))
    assert run(["adapters", "cluster", *folders, "--out", str(tmp_path / "made"), "--set", "rank=4", "--json"]) == 0
    told = capsys.readouterr()
    assert [row["cluster"] for row in json.loads(told.out)] == [0, 0, 1, 1]
    assert "t0, t1; lost to the rank 0.00%" in told.err
    assert np.allclose(change(tmp_path / "made" / "1"), 0.5 * (change(tmp_path / "2") + change(tmp_path / "3")), atol=1e-6)
    assert run(["adapters", "cluster", *folders]) == 0
    assert "cosines" in capsys.readouterr().out
