"""Cases of pointwise_loss: made, run through ctypes, judged by the textbook's formulas in float64.

`python -m cuda_host.pointwise LIBRARY` runs the small ones.
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
from .rows import CODES, EPS, TINY, Limits, close, decode, encode, int32, int64, place, pointer

BCE, KL, KL_LOG = 0, 1, 2
MOST_PARTIALS = 2048


class Elements(ctypes.Structure):
    """fastloss::Elements."""

    _fields_ = [("data", pointer), ("dtype", int32), ("period", int64)]


class CPointwise(ctypes.Structure):
    """fastloss::PointwiseLoss."""

    _fields_ = (
        [(name, Elements) for name in "input target weight pos_weight upstream".split()]
        + [("loss", pointer), ("values", Elements), ("dinput", Elements), ("partial", pointer)]
        + [("n", int64), ("kind", int32), ("share", ctypes.c_double), ("unless_one", ctypes.c_bool)]
    )


@dataclass(frozen=True)
class Case:
    """One call: `weight` and `pos_weight` are periods, 0 for none; `upstream` "no", "one" number or "each" element's."""

    n: int
    kind: int = BCE
    dtype: str = "fp32"
    target: str = ""  # the dtype of the target; "" for that of the input
    weight: int = 0
    pos_weight: int = 0
    upstream: str = "no"
    loss: bool = True
    values: bool = False
    gradient: bool = True
    share: float = 1.0
    offset: int = 0  # elements after a 16-byte boundary where the input starts
    spread: float = 3.0

    @property
    def target_dtype(self) -> str:
        return self.target or self.dtype


def _line(x: NDArray[Any], dtype: str, offset: int = 0) -> NDArray[Any]:
    """x in memory that ends where it ends."""
    line = place((1, len(x)), encode(x[:1], dtype), offset, len(x))[0]
    line[:] = encode(x, dtype)
    return line


def truth(kind: int, x: Any, t: Any, w: Any, p: Any) -> tuple[Any, Any, Any]:
    """Value and slope of each element, and the size of the value's terms."""
    if kind == KL:
        log = np.log(np.where(t == 0, 1, t))
        return t * (log - x), -t, np.abs(t * log) + np.abs(t * x)
    if kind == KL_LOG:
        q = np.exp(t)
        return q * (t - x), -q, np.abs(q * t) + np.abs(q * x)
    value = w * (p * t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x))
    slope = w * ((1 - t) / (1 + np.exp(-x)) - p * t / (1 + np.exp(x)))
    return value, slope, np.abs(value)


def run(library: Path, case: Case, limits: Limits) -> None:
    """Runs the case; AssertionError where float64 says something else."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    n, kind = case.n, case.kind
    t = rng.uniform(0, 1, n)
    t[::3] = np.round(t[::3])  # exactly 0 and 1 as well
    if kind == KL_LOG:
        t = np.log(t + 1e-6)
    given = {
        "input": (_line(rng.normal(0, case.spread, n), case.dtype, case.offset), case.dtype),
        "target": (_line(t, case.target_dtype), case.target_dtype),
        "weight": (_line(rng.uniform(0, 2, max(1, case.weight)), "fp32"), "fp32"),
        "pos_weight": (_line(rng.uniform(0, 4, max(1, case.pos_weight)), case.dtype), case.dtype),
        "upstream": (_line(rng.normal(0, 1, 1 if case.upstream == "one" else n), "fp32"), "fp32"),
    }
    before = {name: a.copy() for name, (a, _) in given.items()}
    wide = {name: decode(a, dtype) for name, (a, dtype) in given.items()}
    values, dinput = (_line(np.full(n, 7.0), d) for d in (case.target_dtype, case.dtype))
    loss, partial = np.full(1, np.nan, np.float32), np.full(MOST_PARTIALS, np.nan)

    def elements(name: str, used: bool = True) -> Elements:
        a, dtype = given[name]
        return Elements(a.ctypes.data if used else None, CODES[dtype], len(a))

    call = CPointwise(
        elements("input"), elements("target"), elements("weight", case.weight > 0),
        elements("pos_weight", case.pos_weight > 0), elements("upstream", case.upstream != "no"),
        loss.ctypes.data if case.loss else None,
        Elements(values.ctypes.data if case.values else None, CODES[case.target_dtype], n),
        Elements(dinput.ctypes.data if case.gradient else None, CODES[case.dtype], n),
        partial.ctypes.data, n, kind, case.share, False,
    )  # fmt: skip
    error = build.load(library).c_pointwise(ctypes.byref(call), ctypes.byref(limits))
    if error:
        raise RuntimeError(error.decode())
    for name, (a, _) in given.items():
        np.testing.assert_array_equal(a, before[name], f"{case}: {name} was written")
    w = np.resize(wide["weight"], n) if case.weight else np.ones(n)
    p = np.resize(wide["pos_weight"], n) if case.pos_weight else np.ones(n)
    with np.errstate(over="ignore"):
        value, slope, size = truth(kind, wide["input"], wide["target"], w, p)
    if case.loss:
        close(f"{case}: loss", loss[0], case.share * value.sum(), 1e-6 * case.share * size.sum())
    if case.values:
        slack = 1e-6 * size + EPS[case.target_dtype] * np.abs(value) + TINY[case.target_dtype]
        close(f"{case}: values", decode(values, case.target_dtype), value, slack)
    if case.gradient:
        want = slope * case.share * (1 if case.upstream == "no" else wide["upstream"])
        scale = (1 + p) * w * case.share * (1 if case.upstream == "no" else np.abs(wide["upstream"]))
        slack = 1e-6 * scale * (1 if kind == BCE else np.abs(slope)) + EPS[case.dtype] * np.abs(want) + TINY[case.dtype]
        close(f"{case}: gradient", decode(dinput, case.dtype), want, slack)


def small_cases() -> list[Case]:
    """Every loop and every kind, with ends of operands at ends of memory."""
    cases = [Case(n, kind, dtype) for n in (1, 37) for kind in (BCE, KL, KL_LOG) for dtype in ("fp32", "bf16")]
    return [
        *cases,
        Case(5000, weight=5, pos_weight=1, share=1 / 5000),
        Case(4104, dtype="fp16", target="fp32", weight=4104, pos_weight=27, upstream="each", values=True),
        Case(2051, KL, "bf16", "fp32", upstream="one", loss=False),
        Case(2051, dtype="bf16", offset=3, pos_weight=7),
    ]


def main() -> None:
    """Entry point of the sanitizer runs."""
    for case in small_cases():
        run(Path(sys.argv[1]), case, Limits(2, 1, 163 << 10, 164 << 10))


if __name__ == "__main__":
    main()
