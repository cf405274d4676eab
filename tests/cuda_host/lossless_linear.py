"""Cases of lossless_linear on the host: a P7 encoder of its own, the kernel through ctypes, judged in fp64.

`python -m cuda_host.lossless_linear LIBRARY [FAULT]` runs the small ones, with a planted fault (test_cuda_linear_faults.py).
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import build
from .rows import decode, encode, int32, int64, pointer

TILES, ROWS = 1, 0


class CRans(ctypes.Structure):
    """fastloss::RansPlane."""

    _fields_ = [("frequencies", pointer), ("offsets", pointer), ("data", pointer), ("data_bytes", int64)]


class CCompressed(ctypes.Structure):
    """fastloss::Compressed."""

    _fields_ = [
        ("codec", int32), ("number", int32), ("layout", int32), ("numel", int64), ("rows", int64), ("columns", int64),
        ("table", pointer), ("codes", pointer), ("escape_offsets", pointer), ("escape_positions", pointer),
        ("escape_values", pointer), ("escapes", int64), ("bytes", pointer * 3), ("bits", pointer), ("raw", pointer),
        ("coded", CRans * 4), ("block_crc", pointer),
    ]  # fmt: skip


class CLinear(ctypes.Structure):
    """fastloss::CudaLosslessLinear."""

    _fields_ = [
        ("w", CCompressed), ("x", pointer), ("n", int64), ("bias", pointer), ("out", pointer), ("parts", pointer),
    ]  # fmt: skip


def aligned(x: NDArray[Any]) -> NDArray[Any]:
    """A 1-D copy at a multiple of 16 bytes, nothing behind it."""
    out = np.empty(x.size * x.itemsize, np.uint8).view(x.dtype)
    if out.ctypes.data % 16:
        raise RuntimeError(f"an array of {out.nbytes} bytes lies at {out.ctypes.data}: allocators align to 16")
    out[:] = x.reshape(-1)
    return out


def sequence(rows: int, columns: int, layout: int) -> NDArray[np.int64]:
    """The row-major index of each number of the sequence, from the definition in docs/design.md."""
    if layout == ROWS:
        return np.arange(rows * columns)
    band, unit, g, t, i, r, h = np.meshgrid(
        *(np.arange(k) for k in (rows // 16, columns // 128, 8, 4, 8, 4, 2)), indexing="ij"
    )
    row, column = 16 * band + g + 8 * (r & 1), 128 * unit + 16 * i + 2 * t + 8 * (r >> 1) + h
    return (row * columns + column).reshape(-1)


class Matrix:
    """A P7 matrix of bf16 bits [rows, columns] as sections."""

    def __init__(self, bits: NDArray[np.uint16], layout: int) -> None:
        rows, columns = bits.shape
        pair = bits.reshape(-1)[sequence(rows, columns, layout)].reshape(-1, 2)
        field = pair >> 7 & 255
        keys = (field[:, 0] | field[:, 1] << 8).astype(np.int64)
        counts = np.bincount(keys, minlength=65536)
        best = sorted(np.flatnonzero(counts), key=lambda k: (-counts[k], k))[:127]
        table = np.zeros(256, np.uint8)
        code_of = np.full(65536, 127)
        for code, key in enumerate(best):
            table[code], table[128 + code] = key & 255, key >> 8
            code_of[key] = code
        codes = code_of[keys]
        escaped = np.flatnonzero(codes == 127)
        plane = ((pair >> 8 & 128) | (pair & 127)).astype(np.uint8)
        plane[escaped] = 0
        blocks = -(-bits.size // 16384)
        self.layout, self.shape = layout, (rows, columns)
        self.table, self.plane = aligned(table), aligned(plane)
        self.codes = aligned(np.packbits((codes[:, None] >> np.arange(7) & 1).astype(bool), bitorder="little"))
        self.offsets = aligned(np.searchsorted(escaped, np.arange(blocks + 1) * 8192).astype(np.uint64))
        self.positions = aligned((escaped % 8192).astype(np.uint16))
        self.values = aligned(pair[escaped].astype(np.uint16))

    def c(self) -> CCompressed:
        """The same as the kernel sees it."""
        c = CCompressed(codec=1, number=0, layout=self.layout, numel=self.shape[0] * self.shape[1])
        c.rows, c.columns, c.escapes = *self.shape, self.positions.size
        c.table, c.codes = self.table.ctypes.data, self.codes.ctypes.data
        c.escape_offsets, c.escape_positions = self.offsets.ctypes.data, self.positions.ctypes.data
        c.escape_values = self.values.ctypes.data
        c.bytes[0] = self.plane.ctypes.data
        return c

    def hostile(self, rng: np.random.Generator) -> None:
        """Random bytes in every section."""
        for part in (self.table, self.plane, self.codes, self.offsets, self.positions, self.values):
            part.view(np.uint8)[:] = rng.integers(0, 256, part.size * part.itemsize)
        self.offsets[::2] = rng.integers(0, self.positions.size + 2, self.offsets[::2].size)


def weights(rng: np.random.Generator, shape: tuple[int, int], kind: str) -> NDArray[np.uint16]:
    """bf16 bits: as trained; with one number in eight of any exponent near 1; positive powers of two."""
    if kind == "powers":
        return (rng.integers(100, 140, shape) << 7).astype(np.uint16)
    bits = encode(rng.normal(0, 0.02, shape).astype(np.float32), "bf16")
    if kind == "escapes":
        odd = (
            rng.integers(0, 2, shape) << 15 | rng.integers(90, 135, shape) << 7 | rng.integers(0, 128, shape)
        ).astype(np.uint16)
        bits = np.where(rng.random(shape) < 1 / 8, odd, bits)
    return bits


@dataclass(frozen=True)
class Case:
    """x [n, columns] times a matrix [rows, columns]."""

    n: int
    rows: int
    columns: int
    layout: int = TILES
    kind: str = "normal"
    splits: int = 1
    cluster: bool = True
    bias: bool = False
    hostile: bool = False

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k, None))


def run_matrix(library: Path, case: Case, matrix: Matrix, x: NDArray[np.uint16], bias: Any) -> NDArray[np.float64]:
    """The kernel's product."""
    out = np.full((case.n, case.rows), 0x7FC1, np.uint16)
    parts = np.full((case.splits, case.n, case.rows), np.nan, np.float32)
    x = aligned(x)
    bias = None if bias is None else aligned(bias)
    call = CLinear(
        matrix.c(), x.ctypes.data, case.n, None if bias is None else bias.ctypes.data, out.ctypes.data, parts.ctypes.data
    )  # fmt: skip
    error = build.load(library).c_lossless_linear(ctypes.byref(call), case.splits, ctypes.c_bool(case.cluster))
    assert error is None, f"{case}: {error}"
    return decode(out, "bf16").astype(np.float64)


def run(library: Path, case: Case) -> None:
    """Runs the kernel. AssertionError where fp64 says something else."""
    rng = np.random.default_rng([case.n, case.rows, case.columns, case.splits])
    bits = weights(rng, (case.rows, case.columns), case.kind)
    matrix = Matrix(bits, case.layout)
    x = encode(rng.normal(0, 1, (case.n, case.columns)).astype(np.float32), "bf16")
    bias = encode(rng.normal(0, 1, case.rows).astype(np.float32), "bf16") if case.bias else None
    if case.hostile:
        matrix.hostile(rng)
        run_matrix(library, case, matrix, x, bias)  # any numbers, but nothing else
        return
    assert case.kind != "escapes" or bits.size < 2000 or matrix.positions.size > bits.size // 50, (
        "too few escapes for a test of them"
    )
    found = run_matrix(library, case, matrix, x, bias)
    w, y = decode(bits, "bf16").astype(np.float64), decode(x, "bf16").astype(np.float64)
    wanted = y @ w.T + (0 if bias is None else decode(bias, "bf16").astype(np.float64))
    room = 2.0**-8 * np.abs(wanted) + 2.0**-20 * (np.abs(y) @ np.abs(w.T) + np.abs(wanted))
    wrong = ~(np.abs(found - wanted) <= room)
    assert not wrong.any(), f"{case}: {wrong.sum()} wrong, first at {np.argwhere(wrong)[0]}"


def small_cases() -> list[Case]:
    """Every number of tiles of x, both layouts, one to eight parts, blocks that end within a band, many escapes."""
    return [
        Case(1, 16, 128, kind="escapes"),
        Case(8, 144, 640, kind="escapes", splits=2, bias=True),
        Case(9, 32, 1152, kind="escapes", splits=4, cluster=False),
        Case(3, 16, 1024, kind="powers", splits=8),
        Case(20, 48, 384, kind="escapes", splits=2, cluster=False, bias=True),
        Case(64, 16, 256, kind="escapes"),
        Case(1, 1, 128, ROWS, "escapes"),
        Case(5, 17, 1152, ROWS, "escapes", splits=4, bias=True),
        Case(16, 130, 256, ROWS, "escapes", splits=2, cluster=False),
        Case(33, 18, 640, ROWS, "escapes", splits=2, bias=True),
        Case(2, 40, 256, ROWS, "powers"),
        Case(2, 48, 1152, hostile=True, kind="escapes", splits=2),
        Case(2, 35, 1152, ROWS, hostile=True, kind="escapes", splits=2),
    ]


def plant(library: Path, number: int) -> None:
    """Turns on one fault of a library that was built with all of them; 0: none."""
    int32.in_dll(build.load(library), "_ZN8fastloss5faultE").value = number


def main() -> None:
    """Entry point of the sanitizer runs."""
    if len(sys.argv) > 2:
        plant(Path(sys.argv[1]), int(sys.argv[2]))
    for case in small_cases():
        run(Path(sys.argv[1]), case)


if __name__ == "__main__":
    main()
