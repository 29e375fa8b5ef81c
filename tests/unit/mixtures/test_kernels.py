"""Triton kernels without a card: their values under Triton's interpreter, and code for real cards from its compiler; `make kernels`.

One process does one of the two: ``TRITON_INTERPRET=1`` decides when triton is imported.
"""

from __future__ import annotations

import ast
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.mixtures.crowd import INTERPRETED

import fedpeft.mixtures
from fedpeft.errors import ConfigError
from fedpeft.mixtures import choice, fused

TRITON = importlib.util.find_spec("triton") is not None
SOURCE = f"{fedpeft.mixtures.__path__[0]}/kernels.py"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels are not interpreted here; run make kernels")
compiled = pytest.mark.skipif(not TRITON or INTERPRETED, reason="triton's compiler is not here; run make kernels")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def test_arguments_of_kernels_have_no_annotation_that_the_compiler_would_look_up():
    with open(SOURCE, encoding="utf-8") as file:
        functions = [node for node in ast.parse(file.read()).body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    assert len(functions) == 2
    written = {ast.unparse(arg.annotation) for function in functions for arg in function.args.args if arg.annotation}
    assert written == {"tl.constexpr"}


def test_a_cpu_has_the_way_only_where_kernels_are_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    fused.available.cache_clear()
    with pytest.raises(ConfigError, match="needs CUDA and triton"):
        choice.check_way("fused", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fused.available.cache_clear()
    assert fused.available("cpu") == TRITON
    fused.available.cache_clear()


@st.composite
def problems(draw):
    """Rank, widths, ragged runs over some of the slots, and a type."""
    slots = draw(st.integers(1, 5))
    used = sorted(draw(st.sets(st.integers(0, slots - 1), min_size=1)))
    runs, start = [], 0
    for slot in used:
        stop = start + draw(st.sampled_from([1, 7, 31, 32, 33, 70]))
        runs.append((slot, start, stop))
        start = stop
    rank, wide, out = (
        draw(st.sampled_from([1, 3, 4, 16, 40, 64, 80])),
        draw(st.sampled_from([5, 64, 70])),
        draw(st.sampled_from([1, 33, 132])),
    )
    return slots, runs, (rank, wide, out), draw(st.sampled_from(list(DTYPES)))


def near(found, wanted, tolerance):
    assert float((found.double() - wanted).abs().max()) <= tolerance * max(float(wanted.abs().max()), 1e-3)


@interpreted
@settings(max_examples=12)
@given(problems(), st.integers(0, 99))
def test_the_kernels_are_products_of_segments(problem, seed):
    from fedpeft.mixtures import kernels

    (slots, runs, (rank, wide, out), dtype), generator = problem, torch.Generator().manual_seed(seed)
    count, tolerance = runs[-1][2], DTYPES[dtype]
    slab = torch.randn(slots, rank * (wide + out) + 8, generator=generator).to(dtype)
    a, b = slab[:, : rank * wide].view(slots, rank, wide), slab[:, rank * wide : rank * (wide + out)].view(slots, out, rank)
    x, g = (torch.randn(width, count, generator=generator).to(dtype).t() for width in (wide, out))
    blocks, segments = (kernels.blocks_of(runs, size, x.device) for size in (kernels.BLOCK_N, count))

    def by_run(left, factor):
        return torch.cat([left[start:stop].double() @ factor[slot].double().t() for slot, start, stop in runs])

    h, gh, y = torch.empty(count, rank, dtype=dtype), torch.empty(count, rank, dtype=dtype), g.clone()
    kernels.rows(x, a, h, blocks, False)
    near(h, by_run(x, a), tolerance)
    kernels.rows(g, b.transpose(1, 2), gh, blocks, False)
    near(gh, by_run(g, b.transpose(1, 2)), tolerance)
    kernels.rows(h, b, y, blocks, True)
    near(y, g.double() + by_run(h, b), tolerance)
    sinks = torch.ones(slots, slab.shape[1])
    into = sinks[:, rank * wide : rank * (wide + out)].view(slots, out, rank)
    kernels.outer(g, h, into, segments)
    wanted = torch.ones(slots, out, rank, dtype=torch.float64)
    for slot, start, stop in runs:
        wanted[slot] += g[start:stop].double().t() @ h[start:stop].double()
    near(into, wanted, tolerance)
    assert bool((sinks[:, : rank * wide] == 1).all()), "what lies beside the slab's view was written"


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "dtype"), [("_rows_kernel", torch.bfloat16), ("_outer_kernel", torch.bfloat16), ("_rows_kernel", torch.float32)], ids=str
)
def test_the_kernels_compile_for_cards(kernel, dtype, capability, tmp_path, monkeypatch):
    """To the machine code of an A100 and an H100, as a launch specialises them: strides of 1 are constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedpeft.mixtures import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, values = getattr(kernels, kernel), {"ADD": True, "BLOCK": 32, "x_k": 1, "q_q": 1, "out_j": 1}
    signature = {}
    for name in function.arg_names:
        if name.endswith("_ptr"):
            whole = name in ("blocks_ptr", "segments_ptr")
            sink = kernel == "_outer_kernel" and name == "out_ptr"
            signature[name] = "*i32" if whole else "*fp32" if sink else f"*{NAMES[dtype]}"
        elif name in values or name.isupper():
            signature[name], values[name] = "constexpr", values.get(name, 64)
        else:
            signature[name] = "i32"
    source = ASTSource(function, signature, {name: value for name, value in values.items() if name in signature})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f".target sm_{capability}" in made.asm["ptx"]
    assert made.metadata.shared <= 48 << 10, "more shared memory than every card gives a block"
