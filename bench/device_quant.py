"""The products of bits at the shapes of docs/device.md: cases of device_kernels.py.

Beside each: torch's int8 product and its bf16 product of the same numbers, and for the search its top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastloss
from device_timing import DEVICE, Case, in_turn, kernels, on, sample
from fastloss.quant.contract import row_bytes
from implementations import backend

ops = torch.ops.fastloss
COUNT = 10
#: Weights and offset of the planes of a mode's operands.
KINDS = {"binary": ([2], -1), "ternary": ([-1, 2], 0)}


def quant_cases(tiny: bool) -> list[Case]:
    """M, N, K; of a search queries, codes, bits."""
    large, small, narrow, search = (
        ((70, 66, 600), (33, 40, 100), (70, 66, 300), (20, 700, 512))
        if tiny
        else ((8192, 8192, 8192), (4096, 4096, 4096), (8192, 8192, 1024), (1024, 1 << 20, 512))
    )
    return [
        *(Case("quant", "binary", "int32", shape) for shape in (small, large, narrow)),
        *(Case("quant", "binary", "bfloat16", shape) for shape in (small, narrow)),
        Case("quant", "ternary", "int32", small),
        Case("quant", "signs", "uint8", narrow),
        Case("quant", "search", "int32", search),
    ]


def rows_of(rows: int, columns: int, kind: str) -> tuple[Tensor, Tensor]:
    """Random planes without bits behind the last column, and their popcounts."""
    count = len(KINDS[kind][0])
    planes = torch.randint(0, 256, (count, rows, row_bytes(columns)), dtype=torch.uint8, device=DEVICE)
    planes[..., -(-columns // 8) :] = 0
    if columns % 8:
        planes[..., columns // 8] &= 2 ** (columns % 8) - 1
    if kind == "ternary":
        planes[1] &= planes[0]
    counts = torch.zeros(planes.shape[:2], dtype=torch.int32, device=DEVICE)
    for bit in range(8):
        counts += (planes >> bit & 1).sum(-1, dtype=torch.int32)
    return planes, counts


def quant_case(case: Case) -> dict[str, Any]:
    """One product or search; rows of it are compared with the reference, exactly."""
    m, n, columns = case.shape
    kind = "ternary" if case.mode == "ternary" else "binary"
    a, b = rows_of(m, columns, kind), rows_of(n, columns, kind)
    meaning = columns, *KINDS[kind], *KINDS[kind]
    scale = torch.rand(n, device=DEVICE) if case.dtype != "int32" else None
    dtype = getattr(torch, case.dtype)

    def call(a: tuple[Tensor, Tensor]) -> Any:
        if case.mode == "search":
            return ops.hamming_topk(*a, *b, *meaning, None, min(COUNT, n))[0]
        if case.mode == "signs":
            return ops.bgemm_signs(*a, *b, *meaning, None, scale, scale, 0)[0][0]
        return ops.bgemm(*a, *b, *meaning, None, scale, scale, 0, dtype)

    at = sample(m)[:: 4 if case.mode == "search" else 1]
    with backend("reference"):
        expected = call((a[0][:, at].contiguous(), a[1][:, at].contiguous()))
    errors, calls = {}, {}
    for name in kernels():
        try:
            with backend(name):
                errors[f"fastloss-{name}"] = float((call(a)[at] != expected).sum())
        except fastloss.BackendError:
            continue  # this backend has no kernel for it
        calls[f"fastloss-{name}"] = on(name, lambda: call(a))
    calls |= peers(case.mode, m, n, columns)
    times, failed = in_turn(calls)
    pairs = len(KINDS[kind][0]) ** 2
    return {"ms": times, "failed": failed, "errors": errors, "flops": 2 * m * n * columns * pairs}


def peers(mode: str, m: int, n: int, columns: int) -> dict[str, Callable[[], object]]:
    """The same product of int8 and of bf16 numbers; a search takes blocks of codes, whose best are searched again."""
    x, y = (torch.randint(0, 2, (rows, columns), dtype=torch.int8, device=DEVICE) * 2 - 1 for rows in (m, n))
    p, q = x.bfloat16(), y.bfloat16()
    if mode != "search":
        return {"torch int8": lambda: torch._int_mm(x, y.T), "torch bf16": lambda: p @ q.T}

    def search() -> Tensor:
        best = [(p @ part.T).topk(min(COUNT, len(part))).values for part in q.split(1 << 17)]
        return torch.cat(best, 1).topk(min(COUNT, n)).values

    return {"torch bf16": search}
