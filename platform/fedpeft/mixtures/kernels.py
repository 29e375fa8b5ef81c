"""Triton kernels for sorted segments, the SGMV form of Punica (Chen et al. 2023, arXiv 2310.18547), forward and backward; CUDA alone.

Two kernels do all products of a low-rank term: rows of a segment by its slot's matrix (shrink and expand, and both backward),
and the outer product of a segment (gradients of the factors, straight into the strided slab). Slots without tokens cost nothing.

Shape legend: n tokens sorted by slot, K and J widths, T slots, C blocks of at most `BLOCK_N` tokens of one slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Arguments of kernels carry no annotation but tl.constexpr: Triton would look the names up as it compiles.
BLOCK_N = 32
"""Tokens per block: short segments waste little, and tensor cores take 16 and more."""


@triton.jit  # type: ignore[untyped-decorator]
def _rows_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    x_ptr,
    w_ptr,
    out_ptr,
    blocks_ptr,
    width_j,
    width_k,
    x_n,
    x_k,
    w_t,
    w_j,
    w_k,
    out_n,
    out_j,
    ADD: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    BLOCK_J: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
) -> None:
    """``out[i, j] (+)= sum_k x[i, k] w[slot, j, k]`` for the tokens of one block and a tile of j."""
    place = tl.program_id(0) * 3
    slot, start, stop = tl.load(blocks_ptr + place), tl.load(blocks_ptr + place + 1), tl.load(blocks_ptr + place + 2)
    i, j, k = start + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK, BLOCK_J), dtype=tl.float32)
    for first in range(0, width_k, BLOCK_K):
        at = first + k
        left = tl.load(x_ptr + i[:, None].to(tl.int64) * x_n + at[None, :] * x_k, (i[:, None] < stop) & (at[None, :] < width_k), 0.0)
        inside = (at[:, None] < width_k) & (j[None, :] < width_j)
        right = tl.load(w_ptr + slot.to(tl.int64) * w_t + j[None, :] * w_j + at[:, None] * w_k, inside, 0.0)
        total += tl.dot(left, right.to(left.dtype), input_precision="ieee")
    mask = (i[:, None] < stop) & (j[None, :] < width_j)
    target = out_ptr + i[:, None].to(tl.int64) * out_n + j[None, :] * out_j
    if ADD:
        total += tl.load(target, mask, 0.0).to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask)


@triton.jit  # type: ignore[untyped-decorator]
def _outer_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    p_ptr,
    q_ptr,
    out_ptr,
    segments_ptr,
    width_p,
    width_q,
    p_n,
    p_p,
    q_n,
    q_q,
    out_t,
    out_p,
    out_q,
    BLOCK: tl.constexpr,  # noqa: N803
    BLOCK_P: tl.constexpr,  # noqa: N803
    BLOCK_Q: tl.constexpr,  # noqa: N803
) -> None:
    """``out[slot, p, q] += sum_i p[i, p] q[i, q]`` over all tokens of one segment, for a tile of (p, q)."""
    place = tl.program_id(0) * 3
    slot, start, stop = tl.load(segments_ptr + place), tl.load(segments_ptr + place + 1), tl.load(segments_ptr + place + 2)
    p, q = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    total = tl.zeros((BLOCK_P, BLOCK_Q), dtype=tl.float32)
    for first in range(start, stop, BLOCK):
        i = first + tl.arange(0, BLOCK)
        left = tl.load(p_ptr + i[None, :].to(tl.int64) * p_n + p[:, None] * p_p, (i[None, :] < stop) & (p[:, None] < width_p), 0.0)
        right = tl.load(q_ptr + i[:, None].to(tl.int64) * q_n + q[None, :] * q_q, (i[:, None] < stop) & (q[None, :] < width_q), 0.0)
        total += tl.dot(left, right.to(left.dtype), input_precision="ieee")
    mask = (p[:, None] < width_p) & (q[None, :] < width_q)
    target = out_ptr + slot.to(tl.int64) * out_t + p[:, None] * out_p + q[None, :] * out_q
    tl.store(target, (tl.load(target, mask, 0.0).to(tl.float32) + total).to(out_ptr.dtype.element_ty), mask)


def rows(x: Tensor, w: Tensor, out: Tensor, blocks: Tensor, add: bool) -> None:
    """``out (+)= x w[slot]'``: x (n, K), w (T, J, K), out (n, J), ``blocks`` (C, 3) of slot, start, stop, int32."""
    wide, deep = _tile(w.shape[1]), _tile(w.shape[2])
    grid = (len(blocks), triton.cdiv(w.shape[1], wide))
    sizes = (w.shape[1], w.shape[2], *x.stride(), *w.stride(), *out.stride())
    _rows_kernel[grid](x, w, out, blocks, *sizes, ADD=add, BLOCK=BLOCK_N, BLOCK_J=wide, BLOCK_K=deep)


def outer(p: Tensor, q: Tensor, out: Tensor, segments: Tensor) -> None:
    """``out[slot] += p' q``: p (n, P), q (n, Q), out (T, P, Q) with any strides, ``segments`` (slots, 3) of slot, start, stop, int32."""
    tall, wide = _tile(p.shape[1]), _tile(q.shape[1])
    grid = (len(segments), triton.cdiv(p.shape[1], tall), triton.cdiv(q.shape[1], wide))
    sizes = (p.shape[1], q.shape[1], *p.stride(), *q.stride(), *out.stride())
    _outer_kernel[grid](p, q, out, segments, *sizes, BLOCK=BLOCK_N, BLOCK_P=tall, BLOCK_Q=wide)


def blocks_of(runs: list[tuple[int, int, int]], size: int, device: torch.device) -> Tensor:
    """Segments (slot, start, stop) cut into blocks of at most ``size`` tokens, (C, 3) int32."""
    cut = [(slot, first, min(first + size, stop)) for slot, start, stop in runs for first in range(start, stop, size)]
    return torch.tensor(cut, dtype=torch.int32).to(device)


def _tile(width: int) -> int:
    """A power of two from 16 to 64."""
    return int(min(max(triton.next_power_of_2(width), 16), 64))
