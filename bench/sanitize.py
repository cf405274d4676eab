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
from fastloss.contract import Want
from implementations import backend

ops = torch.ops.fastloss
ROWS = [(1, 1), (5, 77), (3, 4099), (2, 40001)]
HEADS = [(1, 8, 1), (5, 24, 77), (130, 64, 300)]
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
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"sanitize: {calls} calls done")


if __name__ == "__main__":
    main()
