"""Cases of region_stats on the host: made, run through ctypes, judged in float64.

`python -m cuda_host.regions LIBRARY` runs the small ones.
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
from .rows import CODES, EPS, TINY, decode, encode, int32, int64, place, pointer

SQUARED, BCE, ENTROPY, SHARP, PROBABILITIES = 1, 2, 4, 8, 16
ALL = SQUARED | BCE | ENTROPY
BYTE = 3


class CRegionStats(ctypes.Structure):
    """fastloss::RegionStats."""

    _fields_ = (
        [(name, pointer) for name in "logits target mask coef stats dlogits".split()]
        + [(name, int64) for name in "n size mask_share".split()]
        + [(name, int32) for name in "dtype target_dtype want".split()]
        + [("sharpness", ctypes.c_float)]
    )


@dataclass(frozen=True)
class Case:
    """Both kernels on `n` regions of `size` values."""

    size: int
    n: int = 2
    dtype: str = "fp32"
    target: str = "byte"  # or "fp32", "own"
    want: int = 0
    mask_share: int = 0  # 0: no mask
    slices: int = 1
    offset: int = 0  # elements after a 16-byte boundary where logits, targets and gradient start
    hard: bool = False

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k, None))


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -x))


def judge(
    x: NDArray[np.float64],
    t: NDArray[np.float64],
    m: NDArray[np.bool_],
    coef: NDArray[np.float64],
    want: int,
    sharpness: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(stats [10, n], gradient, the largest term of each gradient)."""
    plain = p = x if want & PROBABILITIES else sigmoid(x)
    q = 1 - x if want & PROBABILITIES else sigmoid(-x)
    slope = np.ones_like(x) if want & PROBABILITIES else p * q
    plain_slope, plain_q = slope, q
    if want & SHARP:
        y = sharpness * (p - q) / 2
        p, q = sigmoid(y), sigmoid(-y)
        slope = sharpness * p * q * slope
    error, zero = p * (1 - t) - q * t, np.zeros_like(x)
    softplus = np.logaddexp(0, x), np.logaddexp(0, -x)
    bce = np.where(t < 1, (1 - t) * softplus[0], 0) + np.where(t > 0, t * softplus[1], 0)
    far = np.clip(x, -800, 800)
    entropy = plain * np.logaddexp(0, -far) + plain_q * np.logaddexp(0, far)
    square, label = (error**2, t * t) if want & SQUARED else (zero, zero)
    terms = [zero + 1, t, p * t, p * (1 - t), q * t, q * (1 - t), square, label]
    terms += [bce if want & BCE else zero, entropy if want & ENTROPY else zero]
    stats = np.stack([np.where(m, term, 0).sum(1) for term in terms])
    c = coef[:, :, None]
    parts = [c[0] * t * slope, c[1] * (1 - t) * slope]
    if want & SQUARED:
        parts.append(c[2] * error * slope)
    if want & BCE:
        parts.append(c[3] * (plain * (1 - t) - plain_q * t))
    if want & ENTROPY:
        parts.append(-c[4] * far * plain_slope)
    gradient, size = (np.where(m, sum(f(part) for part in parts), 0) for f in (lambda a: a, np.abs))
    return stats, gradient, size


def run(library: Path, case: Case) -> None:
    """Runs both kernels. AssertionError where float64 says something else."""
    rng = np.random.default_rng(case.size + case.want)
    shape, sharpness = (case.n, case.size), 7.0
    x = rng.normal(0, 3, shape)
    t = (rng.random(shape) < 0.3).astype(np.float64)
    if case.hard:
        x[0] = np.where(t[0] > 0, 1, -1) * np.linspace(5, 120, case.size)
        x[1] = -np.where(t[1] > 0, 1, -1) * np.linspace(5, 120, case.size)
        x[2] += 1e4
        x[3, 0], t[3, 0] = -np.inf, 0
    if case.want & PROBABILITIES:
        x = sigmoid(x)
    logits = place(shape, encode(x[:1], case.dtype), case.offset, case.size)
    logits[:] = encode(x, case.dtype)
    kind = case.dtype if case.target == "own" else case.target
    labels = t.astype(np.uint8) if kind == "byte" else encode(t, kind)
    target = place(shape, labels, case.offset, case.size)
    target[:] = labels
    mask = (rng.random((max(1, case.n // max(1, case.mask_share)), case.size)) < 0.6).astype(np.uint8)
    m = np.repeat(mask, case.mask_share, 0) > 0 if case.mask_share else np.ones(shape, bool)
    if case.mask_share:
        logits[~m] = encode(np.array(np.nan), case.dtype)  # must not matter
    coef = rng.normal(0, 1, (5, case.n)).astype(np.float32)
    part = np.full((10, case.slices, case.n), -7, np.float32)
    out = place(shape, logits, case.offset, case.size)
    call = CRegionStats(
        logits.ctypes.data, target.ctypes.data, mask.ctypes.data if case.mask_share else None, None, part.ctypes.data, None,
        case.n, case.size, max(1, case.mask_share), CODES[case.dtype], BYTE if kind == "byte" else CODES[kind], case.want,
        sharpness,
    )  # fmt: skip
    launch = build.load(library).c_region_stats
    error = launch(ctypes.byref(call), case.slices)
    assert error is None, error
    call.stats, call.coef, call.dlogits = None, coef.ctypes.data, out.ctypes.data
    error = launch(ctypes.byref(call), case.slices)
    assert error is None, error
    given = np.where(m, decode(logits, case.dtype), 0.5)
    with np.errstate(over="ignore"):
        stats, gradient, size = judge(given, t, m, coef.astype(np.float64), case.want, sharpness)
    close(f"{case}: stats", part.astype(np.float64).sum(1), stats, 2e-6 * np.abs(stats) + 1e-37)
    relative = 1e-5 if case.want & SHARP else 2e-6
    slack = relative * size + EPS[case.dtype] * np.abs(gradient) + TINY[case.dtype]
    close(f"{case}: gradient", decode(out, case.dtype), gradient, slack)


def close(what: str, got: NDArray[Any], right: NDArray[Any], slack: NDArray[Any]) -> None:
    wrong = ~(np.abs(got - right) <= slack)
    assert not wrong.any(), f"{what}: {np.argwhere(wrong)[0]}: {got[wrong][0]!r}, not {right[wrong][0]!r}"


def small_cases() -> list[Case]:
    """For the sanitizers: every kernel, with regions that end where their memory ends."""
    return [
        Case(1, want=ALL),
        Case(301, 4, mask_share=2, slices=3, want=ALL | SHARP),
        Case(264, 2, "bf16", "own", slices=2, offset=8),
        Case(263, 2, "fp16", "fp32", slices=2, offset=3, want=SQUARED | PROBABILITIES, mask_share=1),
    ]


def main() -> None:
    """Entry point of the sanitizer runs."""
    for case in small_cases():
        run(Path(sys.argv[1]), case)


if __name__ == "__main__":
    main()
