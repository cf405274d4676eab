"""Dot products along a list of edges, and the sums of rows that are their gradients: no atomics, one order of summation.

Ids cannot be checked without waiting for the GPU: one that is out of range is never used as an index, and gives NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import NAN, on_device, wide

EDGES, DEPTH = 32, 64
SUM_EDGES, SUM_DEPTH = 16, 128


@triton.jit(do_not_specialize=["edges", "M", "N"])
def edge_dot_kernel(q, k, edge_rows, edge_columns, dots, edges, M, N, D, stride_q, stride_k, BLOCK: tl.constexpr,
                    BK: tl.constexpr):  # fmt: skip
    """dots_e = <q_r, k_c> in fp32."""
    e = wide(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    inside = e < edges
    r = tl.load(edge_rows + e, mask=inside, other=0)
    c = tl.load(edge_columns + e, mask=inside, other=0)
    real = inside & (r >= 0) & (r < M) & (c >= 0) & (c < N)
    r, c = tl.where(real, r, 0), tl.where(real, c, 0)
    total = tl.zeros([BLOCK], tl.float32)
    d = tl.arange(0, BK)
    for d0 in range(0, D, BK):
        some = real[:, None] & (d[None, :] < D - d0)
        a = tl.load(q + r[:, None] * stride_q + (d0 + d)[None, :], mask=some, other=0.0).to(tl.float32)
        b = tl.load(k + c[:, None] * stride_k + (d0 + d)[None, :], mask=some, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 1)
    tl.store(dots + e, tl.where(real, total, NAN), mask=inside)


@triton.jit(do_not_specialize=["edges", "N"])
def edge_sum_kernel(x, weight, pointer, source, sums, edges, N, D, stride_x, BLOCK: tl.constexpr,
                    BK: tl.constexpr):  # fmt: skip
    """sums_i = sum over e in pointer_i..pointer_(i+1) of weight_e x_(source_e): one row and BK columns a program."""
    row = wide(tl.program_id(0))
    d = tl.program_id(1) * BK + tl.arange(0, BK)
    e = tl.maximum(tl.load(pointer + row), 0)
    stop = tl.minimum(tl.load(pointer + row + 1), edges)
    total = tl.zeros([BK], tl.float32)
    while e < stop:
        at = e + tl.arange(0, BLOCK)
        inside = at < stop
        s = tl.load(source + at, mask=inside, other=0)
        real = inside & (s >= 0) & (s < N)
        w = tl.load(weight + at, mask=inside, other=0.0)
        w = tl.where(inside & (real == 0), NAN, w)
        s = tl.where(real, s, 0)
        some = real[:, None] & (d < D)[None, :]
        part = tl.load(x + s[:, None] * stride_x + d[None, :], mask=some, other=0.0).to(tl.float32)
        total += tl.sum(part * w[:, None], 0)
        e += BLOCK
    tl.store(sums + row * D + d, total.to(sums.dtype.element_ty), mask=d < D)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def edge_dot(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """<q_r, k_c> of each edge, fp32 [E]."""
    q, k = _rows(q), _rows(k)
    edges = rows.shape[0]
    dots = torch.empty(edges, dtype=torch.float32, device=q.device)
    if edges:
        with on_device(q):
            edge_dot_kernel[(triton.cdiv(edges, EDGES),)](
                q, k, rows.contiguous(), columns.contiguous(), dots, edges, q.shape[0], k.shape[0], q.shape[1], q.stride(0),
                k.stride(0), BLOCK=EDGES, BK=DEPTH,
            )  # fmt: skip
    return dots


def edge_sum(x: Tensor, weight: Tensor, pointer: Tensor, source: Tensor) -> Tensor:
    """sum over e in pointer_i..pointer_(i+1) of weight_e x_(source_e), [M, D] in the dtype of x."""
    x = _rows(x)
    m, d = pointer.shape[0] - 1, x.shape[1]
    sums = x.new_empty(m, d)
    if sums.numel():
        with on_device(x):
            edge_sum_kernel[(m, triton.cdiv(d, SUM_DEPTH))](
                x, weight.float().contiguous(), pointer.contiguous(), source.contiguous(), sums, source.shape[0], x.shape[0],
                d, x.stride(0), BLOCK=SUM_EDGES, BK=SUM_DEPTH,
            )  # fmt: skip
    return sums
