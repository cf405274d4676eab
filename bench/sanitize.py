"""Every kernel on small, awkward shapes, for compute-sanitizer to watch: `python bench/sanitize.py [--rows-only]`.

One element past the end of a row, a tile or a buffer is what it is after: odd widths, one class, unaligned and strided views.
Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor

import fastloss
from fastloss.contract import PairNeeds, PairWant, Want
from fastloss.pairs.pairing import Pairing
from fastloss.quant import cuda_bgemm, selftest
from fastloss.quant.contract import Pack
from implementations import backend

ops = torch.ops.fastloss
ROWS = [(1, 1), (5, 77), (3, 4099), (2, 40001)]
HEADS = [(1, 8, 1), (5, 24, 77), (130, 64, 300)]
PAIRS = [(1, 1, 8), (5, 77, 24), (130, 70, 65)]
BITS = [(1, 1, 1), (5, 77, 33), (67, 130, 600)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EVERYTHING = int(Want.ENTROPY | Want.SUM | Want.SUMSQ | Want.TEMPERED | Want.ARGMAX)


def views(n: int, v: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """[n, v] logits: contiguous; rows apart and off any 16-byte boundary."""
    apart = torch.randn(n, v + 3, device=device).to(dtype)
    return [torch.randn(n, v, device=device).to(dtype), apart[:, 1 : v + 1]]


def rows(n: int, v: int, dtype: torch.dtype, device: str) -> int:
    y = torch.randint(0, v, (n,), device=device)
    y[-1] = -100 if n > 1 else y[-1]
    prob = torch.rand(n, v, device=device).to(dtype)
    weight, temperature = torch.rand(v, device=device), torch.rand(n, device=device) + 0.5
    coef, epilogue = torch.rand(7, n, device=device), torch.rand(4, n, device=device)
    calls = 0
    for z, (target, q), want in itertools.product(
        views(n, v, dtype, device), ((y, None), (None, prob)), (0, EVERYTHING)
    ):
        t = temperature if want else None
        tail = (-100, want, 0.5, 30.0 if want else 0.0)
        stats, argmax = ops.row_stats(z, target, q, weight, t, *tail)
        ops.row_stats_backward(coef, stats, argmax, z, target, q, weight, t, *tail)
        ops.cross_entropy(z, target, q, weight, epilogue, -100, int(Want.SUM) if want else 0, *tail[2:])
        calls += 3
    return calls


def heads(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> int:
    x, w, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((n, d), (v, d), (v,)))
    y = torch.randint(0, v, (n,), device=device)
    coef, epilogue = torch.rand(7, n, device=device), torch.rand(4, n, device=device)
    calls = 0
    for bias, want in itertools.product((None, b), (0, int(Want.ENTROPY | Want.SUM))):
        tail = (-100, want, 1.0, 0.0)
        stats, argmax = ops.linear_row_stats(x, w, bias, y, None, None, None, *tail)
        ops.linear_row_stats_backward(coef, stats, argmax, x, w, bias, y, None, None, None, *tail)
        calls += 2
        try:
            ops.linear_cross_entropy(x, w, bias, y, None, None, epilogue, -100, want & int(Want.SUM), 1.0, 0.0)
            calls += 1
        except fastloss.BackendError:
            continue  # a backend without this op
    return calls


def pairings(m: int, n: int, d: int, dtype: torch.dtype, device: str) -> list[Pairing]:
    """Pairs by a diagonal alone; by ids, windows and valid rows; by bits and a guide. q is off any 16-byte boundary."""
    q, k = torch.randn(m, d + 3, device=device).to(dtype)[:, 1 : d + 1], torch.randn(n, d, device=device).to(dtype)
    scale = torch.rand(m, device=device) + 0.5

    def ids(size: int) -> Tensor:
        return torch.randint(0, 3, (size,), device=device, dtype=torch.int32)

    labels = dict(positive_rows=ids(m), positive_columns=ids(n), excluded_rows=ids(m), excluded_columns=ids(n))
    valid = {name: (ids(size) > 0).to(torch.uint8) for name, size in (("row_valid", m), ("column_valid", n))}
    bits = torch.randint(-(2**31), 2**31 - 1, (m, -(-n // 32)), device=device).to(torch.int32)
    guide = dict(guide_q=q[:, :5].contiguous(), guide_k=k[:, :5].contiguous(), guide_limit=torch.rand(m, device=device))
    return [
        Pairing(q, k, scale, positive_diagonals=(0,), excluded_diagonals=(1,), **valid),
        Pairing(q, k, scale, torch.rand(n, device=device) + 0.5, low=-scale, high=scale, **labels, **valid),
        Pairing(q, k, scale, positive_rows=bits, **guide),
    ]


def pairs(m: int, n: int, d: int, dtype: torch.dtype, device: str, gemms: bool) -> int:
    """Forwards, and where a library's GEMM may be called, backwards; a backend that lacks an op is passed over."""
    row_grad, column_grad, map_grad = (torch.rand(*s, device=device) for s in ((9, m), (7, n), (8, m)))
    needs = int(PairNeeds.Q | PairNeeds.K | PairNeeds.ROW_SCALE | PairNeeds.COLUMN_SCALE)
    calls = 0
    for p, want in itertools.product(pairings(m, n, d, dtype, device), (1, int(sum(PairWant)))):
        if not fastloss.registry.able("pair_stats", *p):
            break
        extra = (row_grad[0], row_grad[1], want, 2.0, 0) if want > 1 else (None, None, want, 1.0, 0)
        tables = ops.pair_stats(*p, *extra)
        ops.pair_map(*p, None, row_grad[2], 0)
        ops.row_topk(*p, 3, 3)
        calls += 3
        if gemms:
            ops.pair_stats_backward(row_grad, column_grad, *tables, *p, *extra, needs)
            ops.pair_map_backward(map_grad, *p, None, row_grad[2], 0, needs)
            calls += 2
    q, k = torch.randn(m, d, device=device).to(dtype), torch.randn(n, d + 3, device=device).to(dtype)[:, 1 : d + 1]
    rows, columns = (torch.randint(0, size, (99,), device=device) for size in (m, n))
    rows = rows.sort().values
    ops.edge_dot(q, k, rows, columns)
    ops.edge_sum(k, row_grad.new_ones(99), torch.searchsorted(rows, torch.arange(m + 1, device=device)), columns)
    return calls + 2


def bits(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> int:
    """Every bit op that the backend has, and on a GPU each kernel of a product (those for bits up to sm_90)."""
    x, w = (torch.randn(size, k, device=device).to(dtype) for size in (m, n))
    calls = 0
    for op in selftest.OPS if min(m, n, k) >= 5 else ():
        given = selftest.arguments(op, x[:, :512].contiguous(), w[:, :512].contiguous())
        if fastloss.registry.able(op, *given):
            getattr(ops, op)(*given)
            calls += 1
    product = (*packed_by_reference(x), *packed_by_reference(w), k, [1, 2], -2, [1, 2], -2)
    row, column = torch.rand(m, device=device), torch.rand(n, device=device)
    if not fastloss.registry.able("bgemm", *product, row, column, column, 3, dtype):
        return calls
    newest = device == "cuda" and torch.cuda.get_device_capability()[0] >= 10
    for plan in (-1,) if device == "cpu" else (4, 5) if newest else (0, 1, 4, 5):
        cuda_bgemm.PLAN = plan
        ops.bgemm(*product, None, None, None, 0, torch.int32)
        ops.bgemm(*product, row, column, column, 3, dtype)
        ops.bgemm_signs(*product, None, column, None, 0)
        ops.hamming_topk(*product, column, min(n, 40))
        calls += 4
    cuda_bgemm.PLAN = -1
    return calls


def packed_by_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    with backend("reference"):
        return ops.pack_bits(x, int(Pack.CODES), None, None, 0, -2, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows-only", action="store_true", help="leave out what calls a library's GEMM")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    calls = 0
    for name, dtype in itertools.product(fastloss.registry.ORDER[options.device], DTYPES):
        if name == "reference":
            continue
        with backend(name):
            calls += sum(rows(*shape, dtype, options.device) for shape in ROWS)
            if not options.rows_only:
                calls += sum(heads(*shape, dtype, options.device) for shape in HEADS)
            calls += sum(bits(*shape, dtype, options.device) for shape in BITS)
            calls += sum(pairs(*shape, dtype, options.device, not options.rows_only) for shape in PAIRS)
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"sanitize: {calls} calls done")


if __name__ == "__main__":
    main()
