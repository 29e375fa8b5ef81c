"""Starts: identity on every base, factors against float64, the same tensors in every process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import Adapter, AdapterSpec, attach, initial, make_spec, save
from fedpeft.adapters.starts import STARTS, Samples, algebra, make_start
from fedpeft.adapters.starts.quantized import quantized
from fedpeft.adapters.starts.watching import covariances, gradients
from fedpeft.bases import Base, HeadSpec, meta_base
from fedpeft.config import build, describe
from fedpeft.errors import AdapterError
from fedpeft.methods import METHODS, Lora
from fedpeft.methods.own.deltas import weight_of
from fedpeft.schemes import SCHEMES
from fedpeft.tasks import TASKS

Warm = Callable[..., Base]
LABELS, LM = HeadSpec("classification", ("a", "b", "c")), HeadSpec("lm")
HELD = Lora(r=4, alpha=4, targets=("attention",), extra=4, held=True)
REWRITING = ("pissa", "olora", "corda", "lora-ga")
ROWS = [{"text": " ".join(f"w{(7 * row + 3 * place) % 60}" for place in range(2 + row % 5)), "label": "abc"[row % 3]} for row in range(24)]


def samples_of(base: Base) -> Samples:
    task = build(TASKS, {"kind": "classification", "name": "t", "labels": ["a", "b", "c"]}, "task")
    return Samples(task, task.encode(ROWS, base), 5)


def product(adapter: Adapter, module: str, pair: str = "") -> Any:
    named = {name: value.astype(np.float64) for name, value in adapter.tensors.named().items()}
    return named[f"base_model.model.{module}.lora_B{pair}.weight"] @ named[f"base_model.model.{module}.lora_A{pair}.weight"]


def weights(base: Base, spec: AdapterSpec) -> dict[str, Any]:
    shell = base.shell(spec.head)
    names = [e.name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for e in spec.layout.entries if e.role == "A"]
    return {name: weight_of(shell.get_submodule(name)).double().numpy() for name in names}


def answers(base: Base, adapter: Adapter, inputs: dict[str, Any]) -> Any:
    with attach(base, adapter.spec) as live, torch.no_grad():
        live.load(adapter.tensors)
        return live.model.eval()(**inputs).logits


@pytest.mark.parametrize("kind", REWRITING)
def test_the_model_answers_as_the_base_on_any_base(warm: Warm, inputs: dict[str, Any], kind: str) -> None:
    """Computed once on the dense base, at work on a site's quantized one: no weight is rewritten anywhere."""
    dense = warm("encoder")
    spec = make_spec("t", dense, HELD, LABELS)
    before = {name: p.detach().clone() for name, p in dense.model.named_parameters()}
    adapter = make_start(kind, dense, spec, 3, samples_of(dense))
    plain = initial(dense, spec, 3)
    assert np.abs(adapter.tensors.pick({"B"}).flat).max() > 0.01
    for site in (dense, warm("encoder", "nf4"), warm("encoder", "int8")):
        assert torch.allclose(answers(site, adapter, inputs), answers(site, plain, inputs), atol=2e-5)
    assert all(torch.equal(before[name], p) for name, p in dense.model.named_parameters())
    assert not any(p.requires_grad for p in dense.model.parameters())
    for scheme in ("fedavg", "alternating"):
        assert "held" not in SCHEMES[scheme]().phase(1, spec.layout).moves


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_start_from_a_quantized_base_is_of_what_it_reads(warm: Warm, inputs: dict[str, Any], quantization: str) -> None:
    base = warm("causal", quantization)
    spec = make_spec("t", base, HELD, LM)
    adapter = make_start("pissa", base, spec, 0)
    for module, w in weights(base, spec).items():
        u, s, v = np.linalg.svd(w)
        assert np.allclose(product(adapter, module), u[:, :4] * s[:4] @ v[:4], atol=1e-5)
    assert torch.allclose(answers(base, adapter, inputs), answers(base, initial(base, spec, 0), inputs), atol=2e-5)


def test_pissa_is_the_truncated_svd_and_olora_the_qr(warm: Warm) -> None:
    base = warm("causal")
    spec = make_spec("t", base, Lora(r=4, targets=("all",), extra=6, held=True), LM)
    pissa, olora = make_start("pissa", base, spec, 0), make_start("olora", base, spec, 0)
    for module, w in weights(base, spec).items():
        u, s, v = np.linalg.svd(w)
        assert np.allclose(product(pissa, module), u[:, :4] * s[:4] @ v[:4], atol=1e-5)
        q, r = np.linalg.qr(w)
        assert np.allclose(product(olora, module), q[:, :4] @ r[:4], atol=1e-5)
        named = pissa.tensors.named()
        b, a = (named[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
        assert np.allclose(b.T @ b, a @ a.T, atol=1e-4)  # an even split


def test_eva_reads_the_inputs_without_padding_and_starts_at_the_base(warm: Warm, inputs: dict[str, Any]) -> None:
    base = warm("encoder")
    spec = make_spec("t", base, Lora(r=4, targets=("query",)), LABELS)
    samples = samples_of(base)
    adapter = make_start("eva", base, spec, 0, samples)
    assert not adapter.tensors.pick({"B"}).flat.any()
    assert torch.equal(answers(base, adapter, inputs), answers(base, initial(base, spec, 0), inputs))
    rows, shell = [], base.shell(LABELS).eval()
    layer = shell.get_submodule("bert.encoder.layer.1.attention.self.query")
    handle = layer.register_forward_pre_hook(lambda _module, seen: rows.append(seen[0].reshape(-1, 64)))
    with torch.no_grad():
        for ids in samples.data.ids:  # one row at a time: nothing to pad
            shell(input_ids=torch.from_numpy(ids).long()[None])
    handle.remove()
    x = torch.cat(rows).double().numpy()
    _, _, v = np.linalg.svd(x, full_matrices=False)
    a = adapter.tensors.named()["base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight"].astype(np.float64)
    assert np.allclose(a.T @ a, v[:4].T @ v[:4], atol=1e-4)
    assert np.allclose(covariances(base, spec, samples, 0)["bert.encoder.layer.1.attention.self.query"], x.T @ x / len(x), atol=1e-5)


@pytest.mark.parametrize("mode", ["preview", "preserve"])
def test_corda_is_the_weighted_svd(warm: Warm, mode: str) -> None:
    base = warm("encoder")
    spec = make_spec("t", base, HELD, LABELS)
    samples = samples_of(base)
    adapter = make_start({"kind": "corda", "mode": mode}, base, spec, 0, samples)
    moments = covariances(base, spec, samples, 0)
    for module, w in weights(base, spec).items():
        c = moments[module] + 0.01 * np.diag(moments[module]).mean() * np.eye(64)
        u, s, v = np.linalg.svd(w @ c)
        part = slice(0, 4) if mode == "preview" else slice(60, 64)
        want = u[:, part] * s[part] @ v[part] @ np.linalg.inv(c)
        assert np.allclose(product(adapter, module), want, atol=1e-4)


def test_lora_ga_reads_the_gradient_that_autograd_gives(warm: Warm) -> None:
    base = warm("encoder")
    spec = make_spec("t", base, HELD, LABELS)
    samples = samples_of(base)
    found = gradients(base, spec, samples, 5)
    shell = base.shell(LABELS).eval()
    for name, values in initial(base, spec, 5).tensors.pick({"head"}).named().items():
        shell.get_parameter(name.removeprefix("base_model.model.")).data.copy_(torch.from_numpy(values))
    hosts = {module: shell.get_submodule(module).weight.requires_grad_(True) for module in found}
    try:
        total = sum(samples.task.loss(shell, batch).total for batch in samples.task.batches(samples.data, 4, 0, 0))
        want = torch.autograd.grad(total / len(samples.data), list(hosts.values()))
    finally:
        for weight in hosts.values():
            weight.requires_grad_(False)
    for module, gradient in zip(hosts, want, strict=True):
        assert np.allclose(found[module], gradient.double().numpy(), atol=1e-6)
    adapter = make_start("lora-ga", base, spec, 5, samples)
    for module, gradient in found.items():
        u, _, v = np.linalg.svd(gradient)
        named = adapter.tensors.named()
        a, b = (named[f"base_model.model.{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        scale = 64**0.5 / 16.0
        assert np.allclose(a.T @ a, scale * v[:4].T @ v[:4], atol=1e-4)
        assert np.allclose(b @ b.T, scale * u[:, 4:8] @ u[:, 4:8].T, atol=1e-3)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_loftq_brings_a_quantized_base_towards_the_dense_one(warm: Warm, inputs: dict[str, Any], quantization: str) -> None:
    dense, site = warm("encoder"), warm("encoder", quantization)
    spec = make_spec("t", dense, Lora(r=16, targets=("all",)), LABELS)
    adapter = make_start({"kind": "loftq", "quantization": quantization}, dense, spec, 0)
    for (module, w), held in zip(weights(dense, spec).items(), weights(site, spec).values(), strict=True):
        assert np.abs(quantized(w.astype(np.float32), quantization) - held).max() <= 1e-5 * np.abs(w).max()
        assert np.linalg.norm(w - held - product(adapter, module)) < 0.9 * np.linalg.norm(w - held)
    plain = initial(dense, spec, 0)
    wanted = answers(dense, plain, inputs)
    if quantization == "nf4":
        assert (answers(site, adapter, inputs) - wanted).norm() < (answers(site, plain, inputs) - wanted).norm()


def test_experts_come_from_folders_of_the_same_base(warm: Warm, shaken: Callable[..., Adapter], tmp_path: Path) -> None:
    base = warm("encoder")
    houlsby, fused = METHODS["houlsby"](dim=5), build(METHODS, {"kind": "adapterfusion", "dim": 5, "experts": ["mail", "news"]}, "method")  # type: ignore[call-arg]
    spec = make_spec("t", base, fused, LABELS)
    for seed, name in enumerate(("mail", "news")):
        save(shaken(make_spec(name, base, houlsby, LABELS), seed), tmp_path / name)
    start = {"kind": "experts", "adapters": {name: str(tmp_path / name) for name in ("mail", "news")}}
    adapter = make_start(start, base, spec, 0)
    mail = shaken(make_spec("mail", base, houlsby, LABELS), 0).tensors.named()
    key = "base_model.model.bert.encoder.layer.0.output.dense"
    assert np.array_equal(adapter.tensors.named()[f"{key}.adapterfusion.expert.mail.up.weight"], mail[f"{key}.houlsby.up.weight"])
    other = warm("causal")
    with pytest.raises(AdapterError, match="give adapters of this base"):
        make_start(start, other, make_spec("t", other, fused, LABELS), 0)
    with pytest.raises(AdapterError, match="method lora has none"):
        make_start(start, base, make_spec("t", base, Lora(), LABELS), 0)


@pytest.mark.parametrize(("ranks", "extra"), [((3,), 0), ((1, 2), 0), ((3, 1, 3), 2), ((4, 4), 0)])
def test_a_mixture_starts_at_the_best_product_of_its_rank(
    warm: Warm, shaken: Callable[..., Adapter], tmp_path: Path, ranks: tuple[int, ...], extra: int
) -> None:
    """Against the dense weighted sum and its singular values, in float64; the second pair counts; the head is fresh."""
    base, folder, seed = warm("encoder"), tmp_path, 11
    spec = make_spec("new", base, Lora(r=4), LABELS)
    weights_, adapters = np.random.default_rng(seed).normal(size=len(ranks)).tolist(), []
    for place, rank in enumerate(ranks):
        adapters.append(
            shaken(make_spec(f"t{place}", base, Lora(r=rank, extra=extra), HeadSpec("classification", ("x", "y"))), seed + place)
        )
        save(adapters[-1], folder / f"t{place}")
    start = build(STARTS, {"kind": "mixture", "adapters": {f"t{i}": w for i, w in enumerate(weights_)}}, "start").rooted(folder)
    made = make_start(start, base, spec, 3)
    for module in weights(base, spec):
        dense = sum(w * (product(a, module) + (product(a, module, "2") if extra else 0)) for w, a in zip(weights_, adapters, strict=True))
        u, sizes, v = np.linalg.svd(dense)
        np.testing.assert_allclose(product(made, module), (u[:, :4] * sizes[:4]) @ v[:4], atol=1e-5 * max(1.0, sizes[0]))
    assert np.array_equal(made.tensors.pick({"head"}).flat, initial(base, spec, 3).tensors.pick({"head"}).flat)


def test_a_mixture_needs_adapters_of_this_base_and_these_targets(warm: Warm, shaken: Callable[..., Adapter], tmp_path: Path) -> None:
    base, other = warm("encoder"), warm("causal")
    start = build(STARTS, {"kind": "mixture", "adapters": {"a": 1.0}}, "start").rooted(tmp_path)
    save(shaken(make_spec("a", base, Lora(r=2), LABELS), 0), tmp_path / "a")
    with pytest.raises(AdapterError, match="give adapters of this base"):
        make_start(start, other, make_spec("t", other, Lora(r=2), LM), 0)
    with pytest.raises(AdapterError, match=r"acts on other modules than t; set method\.targets"):
        make_start(start, base, make_spec("t", base, Lora(r=2, targets=("all",)), LABELS), 0)
    with pytest.raises(AdapterError, match="has method ia3"):
        make_start(start, base, make_spec("t", base, METHODS["ia3"](), LABELS), 0)


REFUSED = [
    ("pissa", Lora(r=4), "set method.extra = 4 and method.held = true"),
    ("pissa", Lora(r=4, extra=4), "method.held = true"),
    ("olora", Lora(r=4, extra=2, held=True), "method.extra = 4"),
    ("eva", Lora(r=4, dora=True), "without DoRA"),
    ("pissa", METHODS["ia3"](), "has method ia3"),
    ("loftq", Lora(r=4, extra=4, held=True), "method.held = false"),
    ("pissa", Lora(r=65, extra=65, held=True), "narrower than r = 65"),
    ("lora-ga", Lora(r=33, extra=33, held=True), "narrower than 2 r = 66"),
]


@pytest.mark.parametrize(("kind", "method", "reason"), REFUSED)
def test_what_does_not_fit_is_refused(warm: Warm, kind: str, method: Any, reason: str) -> None:
    base = warm("encoder")
    with pytest.raises(AdapterError, match=reason):
        make_start(kind, base, make_spec("t", base, method, LABELS), 0, samples_of(base))


@pytest.mark.parametrize("kind", ["eva", "corda", "lora-ga"])
def test_without_rows_the_way_out_is_named(warm: Warm, kind: str) -> None:
    base = warm("encoder")
    with pytest.raises(AdapterError, match=f"start {kind}: needs rows .*use pissa or olora"):
        make_start(kind, base, make_spec("t", base, HELD, LABELS), 0)


def test_weights_are_needed_and_loftq_needs_dense_ones(warm: Warm) -> None:
    meta = meta_base(warm("encoder").spec)
    for kind in REWRITING:
        with pytest.raises(AdapterError, match="not meta_base"):
            make_start(kind, meta, make_spec("t", meta, HELD, LABELS), 0, samples_of(meta))
    base = warm("encoder", "nf4")
    with pytest.raises(AdapterError, match="compute it on quantization 'none'"):
        make_start("loftq", base, make_spec("t", base, Lora(), LABELS), 0)


@pytest.mark.parametrize("kind", sorted(set(STARTS) - {"experts", "mixture"}))
def test_described_and_built_again(kind: str) -> None:
    start = build(STARTS, kind, "start")
    assert build(STARTS, describe(start), "start") == start
    with pytest.raises(ValueError, match="unknown keys"):
        build(STARTS, {"kind": kind, "rank": 3}, "start")


# the algebra


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(6, 12), st.integers(6, 12))
def test_singular_triples_rebuild_the_best_approximation(seed: int, rank: int, rows: int, columns: int) -> None:
    w = np.random.default_rng(seed).standard_normal((rows, columns))
    u, s, v = algebra.singular(w, rank, np.random.default_rng(0))
    full = np.linalg.svd(w)
    assert np.allclose(u * s @ v, full[0][:, :rank] * full[1][:rank] @ full[2][:rank], atol=1e-8)
    assert (u[np.abs(u).argmax(0), np.arange(rank)] > 0).all()


def test_subspace_iteration_finds_a_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((size, 60)))[0] for size in (200, 150))
    w = left * 0.8 ** np.arange(60) @ right.T
    want = algebra.balanced(w, 8, np.random.default_rng(0))
    monkeypatch.setattr(algebra, "EXACT", 100)
    got, again = (algebra.balanced(w, 8, np.random.default_rng(0)) for _ in range(2))
    assert np.allclose(got[0] @ got[1], want[0] @ want[1], atol=1e-6)
    assert all(np.array_equal(one, two) for one, two in zip(got, again, strict=True))
