"""Cases of edge_dot and edge_sum on the host: made, run through ctypes, judged in float64.

`python -m cuda_host.edges LIBRARY` runs the small ones.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import build
from .regions import close
from .rows import CODES, EPS, TINY, decode, encode, int32, int64, place, pointer


class CEdgeDot(ctypes.Structure):
    """fastloss::EdgeDot."""

    _fields_ = (
        [(name, pointer) for name in "q k".split()]
        + [(name, int64) for name in "m n d ldq ldk edges".split()]
        + [(name, pointer) for name in "rows columns dots".split()]
        + [("dtype", int32)]
    )


class CEdgeSum(ctypes.Structure):
    """fastloss::EdgeSum."""

    _fields_ = (
        [(name, pointer) for name in "x weight pointer source sums".split()]
        + [(name, int64) for name in "m n d ldx edges".split()]
        + [("dtype", int32)]
    )


@dataclass(frozen=True)
class Case:
    """Both kernels on `edges` edges between 9 rows and 14 columns of width `d`."""

    d: int
    edges: int = 40
    dtype: str = "fp32"
    offset: int = 0  # elements after a 16-byte boundary where the operands start
    pad: int = 0  # elements between rows
    outside: bool = False  # some ids are out of range

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k, None))


def run(library: Path, case: Case) -> None:
    """Runs both kernels. AssertionError where float64 says something else."""
    rng, m, n, code = np.random.default_rng(case.d + case.edges), 9, 14, CODES[case.dtype]
    stride = case.d + case.pad
    operands = []
    for count in (m, n):
        values = encode(rng.normal(0, 1, (count, case.d)), case.dtype)
        memory = place((count, case.d), values, case.offset, stride)
        memory[:] = values
        operands.append(memory)
    q, k = operands
    rows, columns = (rng.integers(0, count, case.edges, dtype=np.int64) for count in (m, n))
    rows[rows == 4] = 5  # a row without an edge
    known = np.ones(case.edges, bool)
    if case.outside:
        rows[1], columns[3], columns[5], columns[7] = m, -1, n, 1 << 40
        known[[1, 3, 5, 7]] = False
    dots = np.full(case.edges, -7, np.float32)
    call = CEdgeDot(
        q.ctypes.data, k.ctypes.data, m, n, case.d, stride, stride, case.edges, rows.ctypes.data, columns.ctypes.data,
        dots.ctypes.data, code,
    )  # fmt: skip
    error = build.load(library).c_edge_dot(ctypes.byref(call))
    assert error is None, error
    a, b = decode(q, case.dtype), decode(k, case.dtype)
    products = a[np.where(known, rows, 0)] * b[np.where(known, columns, 0)]
    assert np.isnan(dots[~known]).all()
    right, size = (np.where(known, x.sum(1), 0) for x in (products, np.abs(products)))
    close(f"{case}: dots", np.where(known, dots, 0), right, 1e-6 * size + 1e-37)

    order = np.argsort(np.clip(rows, 0, m - 1), kind="stable")
    where = np.clip(rows, 0, m - 1)[order]
    ends = np.searchsorted(where, np.arange(m + 1)).astype(np.int64)
    weight, source = rng.normal(0, 1, case.edges).astype(np.float32), np.ascontiguousarray(columns[order])
    sums = np.full((m, case.d), 7, dtype=k.dtype)
    given = CEdgeSum(
        k.ctypes.data, weight.ctypes.data, ends.ctypes.data, source.ctypes.data, sums.ctypes.data, m, n, case.d, stride,
        case.edges, code,
    )  # fmt: skip
    error = build.load(library).c_edge_sum(ctypes.byref(given))
    assert error is None, error
    right, size = np.zeros((m, case.d)), np.zeros((m, case.d))
    inside = (source >= 0) & (source < n)
    for e in range(case.edges):
        term = weight[e] * (b[source[e]] if inside[e] else np.full(case.d, np.nan))
        right[where[e]] += term
        size[where[e]] += np.abs(term)
    lost, found = np.isnan(right), decode(sums, case.dtype)
    assert np.array_equal(np.isnan(found), lost), f"{case}: sums"
    found, right, size = (np.where(lost, 0, x) for x in (found, right, size))
    close(f"{case}: sums", found, right, 1e-6 * size + EPS[case.dtype] * np.abs(right) + TINY[case.dtype])


def small_cases() -> list[Case]:
    """For the sanitizers: aligned, misaligned and ragged rows that end where their memory ends."""
    return [Case(1), Case(37, outside=True), Case(64, 33, "bf16"), Case(67, 20, "fp16", offset=3), Case(8, 0)]


def main() -> None:
    """Entry point of the sanitizer runs."""
    for case in small_cases():
        run(Path(sys.argv[1]), case)


if __name__ == "__main__":
    main()
