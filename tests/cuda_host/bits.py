"""Cases of bgemm, bgemm_signs and hamming_topk on the host: made, run through ctypes, judged in int64.

`python -m cuda_host.bits LIBRARY [FAULT]` runs the small ones, with a planted fault (tests/quant/test_cuda_bgemm_faults.py).
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
from .rows import EPS, TINY, close, decode, encode, int32, int64, pointer

#: Weights and offset of every kind of planes (docs/design.md), and two of a kind of their own: odd weights, a weight of 0.
KINDS = {
    "binary": ((2,), -1),
    "ternary": ((-1, 2), 0),
    "codes1": ((1,), 0),
    "codes2": ((1, 2), -2),
    "codes3": ((1, 2, 4), -4),
    "codes4": ((1, 2, 4, 8), -8),
    "odd2": ((2, 4), -3),
    "odd3": ((2, 4, 8), -7),
    "odd4": ((2, 4, 8, 16), -15),
    "any": ((3, -5, 12, 7), 1),
    "zero": ((0, 6), 0),
}
INT32, SIGNS = 3, 4
OUTPUTS = {"fp32": 0, "fp16": 1, "bf16": 2, "int32": INT32, "signs": SIGNS}
NUMBERS: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int32": np.int32}
NONE, RELU, HARDTANH, SILU = range(4)


class CPlanes(ctypes.Structure):
    """fastloss::Planes."""

    _fields_ = [
        ("bits", pointer), ("popcounts", pointer), ("rows", int64), ("columns", int64), ("count", int32),
        ("weights", int32 * 4), ("offset", int32),
    ]  # fmt: skip


class CBgemm(ctypes.Structure):
    """fastloss::CudaBgemm."""

    _fields_ = [
        ("a", CPlanes), ("b", CPlanes), ("row_scale", pointer), ("column_scale", pointer), ("bias", pointer),
        ("activation", int32), ("output", int32), ("out", pointer), ("popcounts", pointer),
    ]  # fmt: skip


class CTopk(ctypes.Structure):
    """fastloss::CudaHammingTopk."""

    _fields_ = [
        ("a", CPlanes), ("b", CPlanes), ("scale", pointer), ("count", int64), ("keys", pointer), ("splits", int32),
        ("values", pointer), ("index", pointer),
    ]  # fmt: skip


def packed(bits: NDArray[Any]) -> NDArray[np.uint8]:
    """0 and 1 [..., K] -> uint8 [..., 64 ceil(K / 512)], aligned to 16 bytes, nothing behind it."""
    columns = bits.shape[-1]
    pitch = -(-columns // 512) * 64
    found = np.packbits(bits.astype(bool), axis=-1, bitorder="little")
    memory = np.empty(16 + bits.size // columns * pitch, np.uint8)
    start = -memory.ctypes.data % 16
    out = memory[start : start + bits.size // columns * pitch].reshape(*bits.shape[:-1], pitch)
    out[:] = 0
    out[..., : found.shape[-1]] = found
    return out


class Operand:
    """Rows of random integers of a kind, as planes and as int64."""

    def __init__(self, rng: np.random.Generator, rows: int, columns: int, kind: str, fill: str = "random") -> None:
        weights, offset = KINDS[kind]
        shape = (len(weights), rows, columns)
        bits = rng.integers(0, 2, shape)
        if fill in ("ones", "zeros"):
            bits = np.full(shape, int(fill == "ones"))
        elif fill == "single":
            bits = np.zeros(shape, np.int64)
            bits[np.arange(shape[0])[:, None], np.arange(rows), rng.integers(0, columns, (shape[0], rows))] = 1
        if kind == "ternary":
            bits[1] &= bits[0]
        self.values = offset + np.tensordot(weights, bits, 1)
        self.planes, self.popcounts = packed(bits), bits.sum(-1).astype(np.int32)
        padded = (*weights, 0, 0, 0)[:4]
        self.c = CPlanes(
            self.planes.ctypes.data, self.popcounts.ctypes.data, rows, columns, len(weights), (int32 * 4)(*padded), offset
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One product of `m` and `n` rows of `k` columns."""

    m: int
    n: int
    k: int
    a: str = "binary"
    b: str = "binary"
    output: str = "int32"
    epilogue: str = ""  # of r(ow_scale), c(olumn_scale), b(ias)
    activation: int = NONE
    fill: str = "random"
    int8: bool = False
    tile: int = 0

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k, None))


def address(x: NDArray[Any] | None) -> int | None:
    return None if x is None else x.ctypes.data


def epilogue(acc: NDArray[Any], row: Any, column: Any, bias: Any, activation: int) -> NDArray[np.float32]:
    """In fp32, rounded at each step."""
    y = acc.astype(np.float32)
    y = y if row is None else y * row[:, None]
    y = y if column is None else y * column
    y = y if bias is None else y + bias
    if activation == RELU:
        return np.where(y < 0, np.float32(0), y)
    if activation == HARDTANH:
        return np.clip(y, np.float32(-1), np.float32(1))
    return y / (1 + np.exp(-y)) if activation == SILU else y


def run(library: Path, case: Case) -> None:
    """Runs the kernel. AssertionError where int64, or its epilogue in fp32, says something else."""
    rng = np.random.default_rng([case.m, case.n, case.k])
    a, b = (Operand(rng, rows, case.k, kind, case.fill) for rows, kind in ((case.m, case.a), (case.n, case.b)))
    row, column, bias = (
        rng.normal(0, 1, size).astype(np.float32) if letter in case.epilogue else None
        for letter, size in (("r", case.m), ("c", case.n), ("b", case.n))
    )
    if bias is not None:
        bias[0] = np.nan
    signs = case.output == "signs"
    pitch = -(-case.n // 512) * 64
    out = np.full((case.m, pitch), 0xA5, np.uint8) if signs else np.full((case.m, case.n), 7, NUMBERS[case.output])
    popcounts = np.zeros(case.m, np.int32)
    call = CBgemm(
        a.c, b.c, address(row), address(column), address(bias), case.activation, OUTPUTS[case.output], out.ctypes.data,
        popcounts.ctypes.data,
    )  # fmt: skip
    error = build.load(library).c_bgemm(ctypes.byref(call), ctypes.c_bool(case.int8), case.tile)
    assert error is None, f"{case}: {error}"
    acc = a.values @ b.values.T
    if case.output == "int32":
        assert np.array_equal(out, acc), str(case)
        return
    with np.errstate(all="ignore"):
        y = epilogue(acc, row, column, bias, case.activation)
        if signs:
            assert np.array_equal(out, packed(y >= 0)) and np.array_equal(popcounts, (y >= 0).sum(1)), str(case)
        elif case.activation == SILU:
            close(str(case), decode(out, case.output), y, (EPS[case.output] + 1e-6) * np.abs(y) + TINY[case.output])
        else:
            assert np.array_equal(
                decode(out, case.output), decode(encode(y, case.output), case.output), equal_nan=True
            ), case


@dataclass(frozen=True)
class TopkCase:
    """The `count` best of `n` for `m` rows."""

    m: int
    n: int
    k: int
    count: int
    splits: int = 1
    a: str = "binary"
    b: str = "binary"
    scale: str = ""  # "", "random", "hard": NaN, infinities, zeros and equal numbers
    int8: bool = False

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(TopkCase, k, None))


def run_topk(library: Path, case: TopkCase) -> None:
    """Runs the search. AssertionError unless values and columns are those of a stable sort of all sums."""
    rng = np.random.default_rng([case.m, case.n, case.k])
    a, b = (Operand(rng, rows, case.k, kind) for rows, kind in ((case.m, case.a), (case.n, case.b)))
    scale = rng.normal(0, 1, case.n).astype(np.float32) if case.scale else None
    if case.scale == "hard":
        scale = rng.choice(np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1, 1, -1], np.float32), case.n)
    keys = np.zeros((case.m, case.splits, case.count), np.int64)
    values = np.full((case.m, case.count), 7, np.float32 if case.scale else np.int32)
    index = np.full((case.m, case.count), -7, np.int64)
    call = CTopk(
        a.c, b.c, address(scale), case.count, keys.ctypes.data, case.splits, values.ctypes.data, index.ctypes.data
    )
    error = build.load(library).c_topk(ctypes.byref(call), ctypes.c_bool(case.int8))
    assert error is None, f"{case}: {error}"
    score: NDArray[Any] = a.values @ b.values.T
    with np.errstate(all="ignore"):
        score = score if scale is None else score.astype(np.float32) * scale
        order = np.argsort(np.where(np.isnan(score), -np.inf, -score.astype(float)), axis=1, kind="stable")
        if scale is not None:  # NaN before +inf
            order = np.stack(
                [np.lexsort((np.arange(case.n), np.where(np.isnan(s), 0, -s), ~np.isnan(s))) for s in score]
            )
    right = order[:, : case.count]
    assert np.array_equal(index, right), str(case)
    assert np.array_equal(values, np.take_along_axis(score, right, 1), equal_nan=bool(case.scale)), str(case)


def small_cases() -> list[Case | TopkCase]:
    """For the sanitizers: rows that end where their memory ends, every output, both engines, several planes and tiles."""
    return [
        Case(3, 5, 70),
        Case(67, 70, 1100, "ternary", "codes2", int8=True),
        Case(66, 65, 600, "codes4", "ternary", "bf16", "rcb", RELU),
        Case(2, 513, 40, output="signs", epilogue="b"),
        Case(130, 129, 513, output="fp16", epilogue="r", tile=1),
        TopkCase(3, 200, 70, 10, 2),
        TopkCase(1, 640, 33, 4, 10),
        TopkCase(35, 130, 513, 40, 3, "ternary", "codes2", "hard", int8=True),
    ]


def run_any(library: Path, case: Case | TopkCase) -> None:
    run(library, case) if isinstance(case, Case) else run_topk(library, case)


def plant(library: Path, number: int) -> None:
    """Turns on one fault of a library that was built with all of them; 0: none."""
    int32.in_dll(build.load(library), "_ZN8fastloss5faultE").value = number


def main() -> None:
    """Entry point of the sanitizer runs."""
    if len(sys.argv) > 2:
        plant(Path(sys.argv[1]), int(sys.argv[2]))
    for case in small_cases():
        run_any(Path(sys.argv[1]), case)


if __name__ == "__main__":
    main()
