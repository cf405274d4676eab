"""Cases of row_terms on the host: made, run through ctypes, judged by terms_truth.

`python -m cuda_host.terms LIBRARY` runs the small ones.
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
from .reference import ARGMAX, ENTROPY, INF, SUM, SUMSQ
from .rows import CODES, EPS, GRADIENT, STATS, TINY, Limits, Plan, close, decode, encode, int32, int64, place, pointer
from .terms_truth import (
    BCE,
    KL,
    MIXTURE,
    SCORE_MEAN,
    STAT_NAMES,
    SUBSET,
    TEACHER,
    TEACHER_MEAN,
    TERM,
    TOTAL_VARIATION,
    Row,
    gradient,
    statistics,
)

EVERYTHING = ENTROPY | SUM | SUMSQ | ARGMAX | TEACHER | TEACHER_MEAN | SCORE_MEAN | TERM | SUBSET
HARD = ("plain", "offset", "huge", "holes", "teacher holes", "ignored", "absent", "above", "twice", "nothing",
        "no teacher", "alone", "alike", "flat", "listed max", "nan")  # fmt: skip


class CRowTerms(ctypes.Structure):
    """fastloss::RowTerms."""

    _fields_ = (
        [(x, pointer) for x in "logits listed teacher value subset temperature coef stats argmax dlogits".split()]
        + [(x, int64) for x in "n v k ld ld_teacher ld_out ignore_index".split()]
        + [(x, int32) for x in "dtype teacher_dtype mode want term".split()]
        + [(x, ctypes.c_float) for x in "scale softcap a b c".split()]
    )


@dataclass(frozen=True)
class Case:
    """Both kernels on a few rows. `rows` names what is hard about each; see hard_row."""

    v: int
    dtype: str = "fp32"
    teacher: str | None = "fp32"
    want: int = EVERYTHING
    term: int = KL
    numbers: tuple[float, float, float] = (0.7, 0.4, 0.3)
    k: int = 1
    rows: tuple[str, ...] = ("plain", "offset", "ignored")
    temperature: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    value: bool = False  # the teacher is generated; `numbers` are low, width, sigma
    shared: bool = False  # one row of the teacher for all
    ignore_index: int = -100
    empty_subset: bool = False
    threads: int = 64
    slices: int = 1
    keep: bool = True
    rows_per_launch: int = 1 << 30
    offset: int = 0  # elements after a 16-byte boundary where the logits start
    teacher_offset: int = 0
    out_offset: int = 0
    pad: int = 0  # columns between rows
    in_place: bool = False

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k, None))


def hard_row(name: str, z: NDArray[Any], t: NDArray[Any], listed: NDArray[Any], case: Case, rng: Any) -> None:
    """Makes one row of scores, teacher and ids hard, in place."""
    v = len(z)
    if name == "offset":
        z += 1e4 if case.dtype == "fp32" else 500
        t -= 1e3 if case.teacher == "fp32" else 300
    elif name == "huge":
        z[int(rng.integers(v))] = 3e4
    elif name == "holes":
        z[rng.random(v) < 0.3] = -INF
        z[0] = 1
    elif name == "teacher holes":
        t[rng.random(v) < 0.3] = -INF
        t[-1] = 1
    elif name == "ignored":
        if len(listed):
            listed[0] = case.ignore_index
            z[:] = np.nan  # must not be read
    elif name == "absent":
        listed[::2] = -1
        listed[1:] = case.ignore_index
    elif name == "above":
        listed[-1:] = v + 3
    elif name == "twice":
        listed[:] = v - 1
    elif name == "nothing":
        z[:] = -INF
    elif name == "no teacher":
        t[:] = -INF
    elif name == "alone":
        z[1:] = -INF
        listed[:] = 0
    elif name == "alike":
        t[:] = z
    elif name == "flat":
        z[:] = t[:] = 0.5
    elif name == "listed max":  # the rest lies far below
        z[listed] = 200
    elif name == "nan":
        z[v // 2] = np.nan
    elif name != "plain":
        raise ValueError(f"unknown row {name!r}")


def run(library: Path, case: Case, limits: Limits | None = None) -> None:
    """Runs both kernels, with `limits` by way of row_terms_cuda. AssertionError where the truth is something else."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    n, v, k = len(case.rows), case.v, case.k
    z, t = rng.normal(0, 3, (n, v)), rng.normal(0, 3, (n, v))
    if case.term == BCE and case.teacher:
        t = rng.random((n, v))
    listed = rng.integers(0, v, (n, k))
    for i, name in enumerate(case.rows):
        hard_row(name, z[i], t[i], listed[i], case, rng)
    if case.shared:
        t[:] = t[0]
    stride = v + case.pad
    logits = place((n, v), encode(z[:1], case.dtype), case.offset, stride)
    logits[:] = encode(z, case.dtype)
    teacher_dtype = case.teacher or "fp32"
    teacher = place((n, v), encode(t[:1], teacher_dtype), case.teacher_offset, 0 if case.shared else stride)
    teacher[:] = encode(t, teacher_dtype)
    z, t = decode(logits, case.dtype), decode(teacher, teacher_dtype)
    out = logits if case.in_place else place((n, v), logits, case.out_offset, stride)
    before = logits.copy()
    low, width, _ = case.numbers
    value = rng.uniform(low - 1, low + width * v + 1, n).astype(np.float32)
    subset = (rng.random(v) < (0 if case.empty_subset else 0.5)).astype(np.uint8)
    temperature = rng.uniform(0.5, 4, n).astype(np.float32) if case.temperature else np.ones(n, np.float32)
    coef = rng.normal(0, 1, (10 + k, n)).astype(np.float32)
    for bit, at in (
        (ENTROPY, 2),
        (TEACHER_MEAN, 3),
        (SCORE_MEAN, 4),
        (TERM, 5),
        (SUBSET, 6),
        (SUM, 7),
        (SUMSQ, 8),
        (ARGMAX, 9),
    ):
        if not case.want & bit:
            coef[at] = np.nan  # not asked for: must not be used
    a, b, c = (float(np.float32(x)) for x in case.numbers)
    truth = [
        Row(
            z[i], listed[i], None if case.value or case.teacher is None else t[i], float(value[i]) if case.value else None,
            subset > 0, float(temperature[i]), case.ignore_index, case.want, float(np.float32(case.scale)), case.softcap,
            case.term, a, b, c,
        )
        for i in range(n)
    ]  # fmt: skip
    stats, argmax = np.full((17 + k, n), -7, np.float32), np.full(n, -7, np.int64)

    def address(x: NDArray[Any], used: bool = True) -> int | None:
        return x.ctypes.data if used else None

    call = CRowTerms(
        address(logits), address(listed, k > 0), address(teacher, not case.value and case.teacher is not None),
        address(value, case.value), address(subset, bool(case.want & SUBSET)), address(temperature, case.temperature),
        address(coef), address(stats), address(argmax, bool(case.want & ARGMAX)), address(out),
        n, v, k, stride, 0 if case.shared else stride, stride, case.ignore_index, CODES[case.dtype], CODES[teacher_dtype],
        STATS, case.want, case.term if case.want & TERM else 0, case.scale, case.softcap, *case.numbers,
    )  # fmt: skip
    for mode in (STATS, GRADIENT):
        call.mode = mode
        plan = Plan(case.threads, case.slices, case.slices > 1 and mode == STATS, case.keep, case.rows_per_launch)
        loaded = build.load(library)
        if limits:
            error = loaded.c_terms_run(ctypes.byref(call), ctypes.byref(limits))
        else:
            error = loaded.c_terms(ctypes.byref(call), ctypes.byref(plan))
        if error:
            raise RuntimeError(error.decode())
        with np.errstate(all="ignore"):
            for i, (name, row) in enumerate(zip(case.rows, truth, strict=True)):
                what = f"{case}: row {i} ({name})"
                if mode == STATS:
                    judge_statistics(what, case, row, stats[:, i], int(argmax[i]))
                else:
                    judge_gradient(what, case, row, coef[:, i], int(argmax[i]), decode(out[i], case.dtype))
            if mode == STATS:  # any forward pairs with any backward
                np.testing.assert_array_equal(logits, before, "the logits were written")
                stats[:] = np.stack([statistics(row)[0] for row in truth], 1)
                argmax[:] = [int(np.argmax(row.z)) for row in truth]
    if case.pad and n > 1:
        whole = np.lib.stride_tricks.as_strided(out, (n - 1, stride), out.strides)
        assert np.all(np.ascontiguousarray(whole[:, v:]).view(np.uint8) == 0xAB), (
            f"{case}: columns between rows were written"
        )


def rounding(case: Case, row: Row) -> float:
    """How much z itself may be off."""
    largest = np.max(np.abs(np.where(np.isfinite(row.z), row.z, 0)))
    return float(4e-7 * largest * (case.scale != 1 or case.softcap != 0) / min(1, row.temperature))


def judge_statistics(what: str, case: Case, row: Row, stats: NDArray[Any], argmax: int) -> None:
    want, size = statistics(row)
    off = rounding(case, row) if not row.ignored else 0
    relative = (4e-5 if case.value else 4e-6) + off
    for k, x in enumerate(want):
        name = STAT_NAMES[k] if k < len(STAT_NAMES) else f"listed {k - len(STAT_NAMES)}"
        slack = relative * size[k] + off * (len(row.z) if name in ("sum", "sumsq", "term") else 2)
        if row.undefined and name in ("slope", "teacher_slope"):
            continue  # with a factor of 0 before what is not defined, or without
        slack = slack * (1 + np.sqrt(abs(size[k]))) if name == "sumsq" else slack
        close(f"{what} {name}", stats[k], x, slack + 1e-30)  # what is smaller may be zero
    if not case.want & ARGMAX:
        assert argmax == -7, f"{what}: argmax written unasked"
    elif row.ignored:
        assert argmax == -1, f"{what}: argmax {argmax} of an ignored row"
    elif not np.isnan(row.z).any():
        best = int(np.argmax(row.z))
        assert argmax == best or row.z[best] - row.z[argmax] < off, f"{what}: argmax {argmax}, not {best}"


def judge_gradient(what: str, case: Case, row: Row, coef: NDArray[Any], argmax: int, out: NDArray[np.float64]) -> None:
    right, size = gradient(row, coef.astype(np.float64), statistics(row)[0], argmax if argmax >= 0 else 0)
    far = sum(np.abs(np.where(np.isfinite(x), x - np.max(x), 0)) for x in (row.z, row.t)) / min(1, row.temperature)
    far = np.where(np.isfinite(far), far, 0)
    off = 0 if row.ignored else rounding(case, row)
    slack = size * (4e-6 + 2e-7 * far + off) + EPS[case.dtype] * np.abs(right) + TINY[case.dtype]
    if case.value:  # differences of erfc: their error is one of erfc, over the mass
        slack = slack + 4e-5 * size + 4e-7
    if case.softcap:  # 1 - (z / softcap)^2 cancels near the cap
        slack = slack + 1e-6 * np.abs(case.scale) * (np.abs(np.nan_to_num(coef)).sum() * (1 + far))
    if off:
        slack = slack + off * (np.abs(np.nan_to_num(coef[8])) + np.abs(np.nan_to_num(coef[5])))
    close(f"{what} gradient", out, right, slack)


def small_cases() -> list[Case]:
    """For the sanitizers: every kernel, loop and barrier, with rows that end where their memory ends."""
    rows = ("plain", "ignored", "twice")
    return [
        Case(1, rows=rows, k=3),
        Case(301, rows=rows, slices=2, offset=3, teacher_offset=3),
        Case(301, "bf16", "fp16", rows=rows, slices=2, keep=False, offset=5, k=0),
        Case(
            603, "bf16", "bf16", rows=rows, slices=3, term=MIXTURE, pad=1, in_place=True, temperature=True, threads=32
        ),
        Case(133, "fp16", "fp32", rows=rows, term=TOTAL_VARIATION, shared=True, softcap=20, k=3, out_offset=1),
        Case(70, "bf16", None, rows=rows, value=True, want=SCORE_MEAN | ARGMAX, numbers=(-3.0, 0.1, 0.5)),
    ]


def main() -> None:
    """Entry point of the sanitizer runs."""
    for case in small_cases():
        run(Path(sys.argv[1]), case)


if __name__ == "__main__":
    main()
