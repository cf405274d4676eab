"""Cases of row_stats: made, run through ctypes, judged by the reference.

`python -m cuda_host.rows LIBRARY [NUMBER...]` runs the small ones.
"""

from __future__ import annotations

import ctypes
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import build
from .reference import (
    ARGMAX,
    ENTROPY,
    INF,
    SUM,
    SUMSQ,
    TEMPERED,
    Row,
    cross_entropy_gradient,
    gradient,
    margin_gradient,
    statistics,
)

STATS, GRADIENT, BOTH = 0, 1, 2
IGNORE = -100
CODES = {"fp32": 0, "fp16": 1, "bf16": 2}
EPS = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
TINY = {"fp32": 1e-37, "fp16": 2.0**-25, "bf16": 1e-37}  # what is smaller may be zero

int32, int64, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class CRowStats(ctypes.Structure):
    """fastloss::RowStats."""

    _fields_ = (
        [(name, pointer) for name in "logits target prob column_weight temperature row stats argmax dlogits".split()]
        + [(name, int64) for name in "n v ld ld_prob ld_out ignore_index".split()]
        + [(name, int32) for name in "dtype prob_dtype mode want".split()]
        + [(name, ctypes.c_float) for name in ("scale", "softcap")]
        + [
            ("upstream", pointer),
            ("margin_loss", ctypes.c_int),
            ("margin_a", ctypes.c_double),
            ("margin_b", ctypes.c_double),
        ]
    )


class Plan(ctypes.Structure):
    """fastloss::RowStatsPlan."""

    _fields_ = [
        ("threads", int32),
        ("slices", int32),
        ("cluster", ctypes.c_bool),
        ("keep", ctypes.c_bool),
        ("rows_per_launch", int64),
    ]


class Limits(ctypes.Structure):
    """fastloss::DeviceLimits."""

    _fields_ = [
        ("multiprocessors", int32),
        ("max_cluster", int32),
        ("shared_per_block", ctypes.c_size_t),
        ("shared_per_multiprocessor", ctypes.c_size_t),
        ("capability", int32),
    ]


@dataclass(frozen=True)
class Case:
    """One call. `rows` names what is hard about each row; see hard_row."""

    v: int
    mode: int = BOTH
    dtype: str = "fp32"
    rows: tuple[str, ...] = ("plain", "offset", "ignored")
    kind: str = "hard"  # or "prob", "none"
    prob_dtype: str = "fp32"
    weight: bool = False
    want: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    margin: tuple[int, float, float] = (0, 0.0, 0.0)
    threads: int = 64
    slices: int = 1
    keep: bool = True
    rows_per_launch: int = 1 << 30
    offset: int = 0  # elements after a 16-byte boundary where the logits start
    out_offset: int = 0
    pad: int = 0  # columns between rows
    in_place: bool = False
    expanded: bool = False  # ld = 0: every row is the same memory
    nll_only: bool = False  # of the epilogue only the first number is not 0

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if k != "rows" and v != getattr(Case, k, None)]
        return " ".join(changed)


def encode(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    """float64 to what a kernel reads; bf16 is uint16, rounded to nearest even."""
    with np.errstate(over="ignore"):
        if dtype != "bf16":
            return x.astype(np.float32 if dtype == "fp32" else np.float16)
        bits = x.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def decode(a: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    """What a kernel wrote, as float64."""
    if dtype == "bf16":
        return (a.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return a.astype(np.float64)


def place(shape: tuple[int, ...], like: NDArray[Any], offset: int, stride: int) -> NDArray[Any]:
    """Rows `stride` elements apart, starting `offset` elements after a 16-byte boundary and ending where the allocation ends."""
    skip, count = offset * like.itemsize, max(1, (shape[0] - 1) * stride + shape[1])
    raw = np.full(skip + count * like.itemsize, 0xAB, np.uint8)
    if raw.ctypes.data % 16:
        raise RuntimeError("numpy did not align its memory to 16 bytes")
    flat = raw[skip:].view(like.dtype)
    return np.lib.stride_tricks.as_strided(flat, shape, (stride * like.itemsize, like.itemsize))


def hard_row(name: str, z: NDArray[np.float64], y: int, rng: np.random.Generator, dtype: str) -> int:
    """Makes one row hard, in place; returns its target."""
    v, other = len(z), (y + 1 + int(rng.integers(max(1, len(z) - 1)))) % len(z)
    if name == "offset":
        z += 1e4 if dtype == "fp32" else 500
    elif name == "huge":
        z[other] = 3e4
    elif name == "holes":
        z[rng.random(v) < 0.3] = -INF
        z[y] = 1
    elif name in ("sure", "surer"):  # p_y about 0.9 and 0.9999
        z[y] = np.log(np.sum(np.exp(np.delete(z, y)))) + (2.2 if name == "sure" else 9.2) if v > 1 else 0
    elif name == "certain":
        z[y] = np.max(z) + 20
    elif name == "ignored":
        z[:] = np.nan  # must not be read
        return IGNORE
    elif name == "above":
        return v + 3
    elif name == "below":
        return -5
    elif name == "nothing":
        z[:] = -INF
    elif name == "alone":
        z[np.arange(v) != y] = -INF
    elif name == "lost":
        z[y] = -INF
    elif name == "nan":
        z[other] = np.nan
    elif name == "inf":
        z[other] = INF
    elif name == "flat":
        z[:] = 0.5
    elif name == "first":
        return 0
    elif name == "last":
        return v - 1
    elif name != "plain":
        raise ValueError(f"unknown row {name!r}")
    return y


def run(library: Path, case: Case, limits: Limits | None = None) -> None:
    """Runs the case, with `limits` by way of row_stats_cuda. AssertionError where the reference says something else."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    n, v = len(case.rows), case.v
    z = rng.normal(0, 3, (n, v))
    target = rng.integers(0, v, n)
    for i, name in enumerate(case.rows):
        target[i] = hard_row(name, z[i], int(target[i]), rng, case.dtype)
    if case.expanded:
        z[:] = z[0]
    stride = 0 if case.expanded else v + case.pad
    logits = place((n, v), encode(z[:1], case.dtype), case.offset, stride)
    logits[:] = encode(z, case.dtype)
    z = decode(logits, case.dtype)
    out = logits if case.in_place else place((n, v), logits, case.out_offset, v + case.pad)
    before = logits.copy()

    prob = place((n, v), encode(z[:1], case.prob_dtype), 1 if case.pad else 0, v + case.pad)
    prob[:] = encode(rng.dirichlet(np.full(v, 0.3), n) if v > 1 else np.ones((n, 1)), case.prob_dtype)
    weight = np.ones(v) if not case.weight else rng.uniform(0, 2, v).astype(np.float32).astype(np.float64)
    temperature = rng.uniform(0.5, 4, n).astype(np.float32)
    row = rng.normal(0, 1, (7 if case.mode == GRADIENT else 4, n)).astype(np.float32)
    if case.mode == BOTH:
        row[2] *= 0.01  # of lse^2: the gradient must not pass the largest fp16
        if case.nll_only:
            row[1:] = 0
        if case.want & SUM == 0:
            row[3] = np.nan  # not asked for: must not be used
    weight32 = weight.astype(np.float32)
    truth = []
    for i in range(n):
        t = int(target[i]) if case.kind == "hard" else None
        p = decode(prob[i], case.prob_dtype) if case.kind == "prob" else None
        scale = float(np.float32(case.scale))
        truth.append(Row(z[i], t, p, weight, float(temperature[i]), case.want, scale, case.softcap))
    argmax = np.full(n, -7, np.int64)
    stats = np.full((8, n), -7, np.float32)
    with np.errstate(all="ignore"):
        wanted = [statistics(r) for r in truth]
        if case.mode == GRADIENT:  # any forward pairs with any backward
            stats[:] = np.stack([w[0] for w in wanted], 1)
            argmax[:] = [0 if np.isnan(r.z).any() else int(np.argmax(r.z)) for r in truth]

    def address(a: NDArray[Any], used: bool = True) -> int | None:
        return a.ctypes.data if used else None

    call = CRowStats(
        address(logits), address(target, case.kind == "hard"), address(prob, case.kind == "prob"),
        address(weight32, case.weight), address(temperature, bool(case.want & TEMPERED)), address(row, case.mode != STATS),
        address(stats), address(argmax, bool(case.want & ARGMAX)), address(out, case.mode != STATS),
        n, v, stride, v + case.pad, v + case.pad, IGNORE,
        CODES[case.dtype], CODES[case.prob_dtype], case.mode, case.want, case.scale, case.softcap, None, *case.margin,
    )  # fmt: skip
    cluster = case.slices > 1 and case.mode != GRADIENT
    plan = Plan(case.threads, case.slices, cluster, case.keep and case.mode != GRADIENT, case.rows_per_launch)
    loaded = build.load(library)
    if limits:
        error = loaded.c_run(ctypes.byref(call), ctypes.byref(limits))
    else:
        error = loaded.c_launch(ctypes.byref(call), ctypes.byref(plan))
    if error:
        raise RuntimeError(error.decode())

    if not case.in_place:
        np.testing.assert_array_equal(logits, before, "the logits were written")
    for i, name in enumerate(case.rows):
        with np.errstate(all="ignore"):
            grad = decode(out[i], case.dtype)
            judge(case, f"{case}: row {i} ({name})", truth[i], wanted[i], stats[:, i], int(argmax[i]), row[:, i], grad)
    if case.pad and n > 1 and case.mode != STATS:
        whole = np.lib.stride_tricks.as_strided(out, (n - 1, v + case.pad), out.strides)
        if not np.all(np.ascontiguousarray(whole[:, v:]).view(np.uint8) == 0xAB):
            raise AssertionError(f"{case}: columns between the rows were written")


def close(what: str, got: Any, want: Any, slack: Any) -> None:
    """NaN and infinities must be the same, the rest within slack."""
    got, want, slack = np.asarray(got, np.float64), np.asarray(want, np.float64), np.asarray(slack)
    same = (got == want) | (np.isnan(got) & np.isnan(want)) | (np.isfinite(want) & (np.abs(got - want) <= slack))
    if not np.all(same):
        at = np.flatnonzero(~np.atleast_1d(same))
        pairs = [(int(k), np.atleast_1d(got)[k], np.atleast_1d(want)[k]) for k in at[:5]]
        raise AssertionError(f"{what}: {len(at)} of {np.size(want)} wrong; (column, got, want): {pairs}")


def judge(
    case: Case, what: str, row: Row, wanted: tuple[Any, Any], stats: Any, argmax: int, numbers: Any, out: Any
) -> None:
    """One row of the result against the reference."""
    ignored = row.target == IGNORE
    if case.mode != GRADIENT:
        want, size = (np.zeros(8), np.zeros(8)) if ignored else wanted
        largest = np.max(np.abs(np.where(np.isfinite(row.z), row.z, 0)))
        scaled = 4e-7 * largest * (case.scale != 1 or case.softcap != 0)  # z itself is rounded
        for k, stat in enumerate("max logsum target mean sum sumsq logsum_t mass".split()):
            slack = scaled * (0 if ignored else (len(row.z) if k in (4, 5) else 1)) * (1 + np.sqrt(abs(size[k])))
            exact = stat == "max" or (stat == "target" and row.prob is None)
            close(f"{what} {stat}", stats[k], want[k], (0 if exact else 2e-6 * size[k]) + slack)
        if case.want & ARGMAX:
            if ignored:
                assert argmax == -1, f"{what}: argmax {argmax} of an ignored row"
            elif not np.isnan(row.z).any():
                best = np.argmax(row.z)
                assert argmax == best or row.z[best] - row.z[argmax] < scaled, f"{what}: argmax {argmax}, not {best}"
    if case.mode == STATS:
        return
    numbers = numbers.astype(np.float64)
    if ignored:
        close(f"{what} gradient", out, np.zeros_like(out), 0)
        return
    if case.mode == GRADIENT:
        grad, size = gradient(row, numbers, stats.astype(np.float64), argmax)
    elif case.margin[0]:
        grad, size = margin_gradient(row, numbers, case.margin)
        size = size * (1 + abs(case.margin[1]))  # d is rounded, and the slope's exponent is a multiple of it
    else:
        grad, size = cross_entropy_gradient(row, numbers)
    far = np.abs(np.where(np.isfinite(row.z), row.z - wanted[0][0], 0)) if np.isfinite(wanted[0][0]) else 0
    z = np.where(np.isfinite(row.z), np.abs(row.z), 0) * (case.scale != 1 or case.softcap != 0)
    margin = np.max(far * row.own) if np.ndim(far) else 0  # its rounding scales the whole row
    relative = 2e-6 + 2e-7 * (far / min(1.0, row.temperature) + margin) + 4e-7 * np.max(z, initial=0)
    slack = np.abs(size) * relative + np.abs(grad) * EPS[case.dtype] + TINY[case.dtype]
    if case.softcap:  # 1 - (z / softcap)^2 cancels near the cap
        slack = slack + 1e-6 * np.abs(case.scale) * (np.nansum(np.abs(numbers[:7])) * (1 + far))
    close(f"{what} gradient", out, grad, slack)


HARD = ("plain", "offset", "huge", "holes", "sure", "surer", "certain", "ignored", "above", "below", "nothing", "alone", "lost",
        "nan", "inf", "flat", "first", "last")  # fmt: skip
EVERYTHING = ENTROPY | SUM | SUMSQ | TEMPERED | ARGMAX


def small_cases() -> list[Case]:
    """Few threads and short rows, for the sanitizers: every kernel, loop and barrier, with ends of rows at ends of memory."""
    rows = ("plain", "ignored", "last")
    lean = [
        Case(v=1, rows=rows, slices=2),
        Case(v=37, rows=rows, dtype="bf16", offset=3),
        Case(v=2049, rows=rows, slices=2, offset=1),
        Case(v=1201, rows=rows, dtype="fp16", slices=4, keep=False, in_place=True),
        Case(v=611, rows=rows, mode=STATS, slices=2),
        Case(v=700, rows=rows, dtype="bf16", mode=GRADIENT, slices=3, out_offset=5, pad=1),
    ]
    wide = [
        Case(v=530, rows=rows, want=EVERYTHING, softcap=30, slices=2, weight=True, threads=32),
        Case(v=531, rows=rows, dtype="bf16", want=EVERYTHING, mode=GRADIENT, weight=True, slices=2, keep=False),
        Case(v=301, rows=rows, kind="prob", dtype="fp16", prob_dtype="fp16", slices=2, want=SUM, pad=3),
    ]
    return lean + wide


def main() -> None:
    """Entry point of the sanitizer runs."""
    cases = small_cases()
    for number in sys.argv[2:] or range(len(cases)):
        run(Path(sys.argv[1]), cases[int(number)])


if __name__ == "__main__":
    main()
