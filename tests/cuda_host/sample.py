"""Cases of row_sample: made, run through ctypes, judged in float64 by a Philox of its own.

`python -m cuda_host.sample LIBRARY` runs the small ones.
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
from .reference import INF
from .rows import CODES, Limits, close, decode, encode, int32, int64, place, pointer

ROWS = ("plain", "offset", "holes", "one", "nothing", "nan", "inf", "flat", "low")


class CRowSample(ctypes.Structure):
    """fastloss::RowSample."""

    _fields_ = (
        [(name, pointer) for name in "logits seed streams index logp".split()]
        + [(name, int64) for name in "n v ld".split()]
        + [("dtype", int32), ("scale", ctypes.c_float), ("softcap", ctypes.c_float)]
    )


class Plan(ctypes.Structure):
    """fastloss::RowSamplePlan."""

    _fields_ = [("threads", int32), ("slices", int32), ("rows_per_launch", int64)]


@dataclass(frozen=True)
class Case:
    """One call; `rows` names what is hard about each row."""

    v: int
    dtype: str = "fp32"
    rows: tuple[str, ...] = ROWS
    scale: float = 1.0
    softcap: float = 0.0
    threads: int = 64
    slices: int = 1
    rows_per_launch: int = 1 << 30
    offset: int = 0  # elements after a 16-byte boundary where the logits start
    pad: int = 0  # columns between rows
    seed: int = 0x123456789ABCDEF


def philox(counter: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Philox 4x32-10 of counters [..., 4]."""
    low = np.uint64(0xFFFFFFFF)
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    for i in range(10):
        key = [np.uint64(((seed >> 32 * j) + i * step) & 0xFFFFFFFF) for j, step in enumerate((0x9E3779B9, 0xBB67AE85))]
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ key[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ key[1], a & low]
    return np.stack(c, -1)


def gumbel(seed: int, stream: int, v: int) -> NDArray[np.float64]:
    """-log E of every column of a stream, from docs/design.md."""
    blocks = np.arange((v + 3) // 4)

    def words(half: int) -> NDArray[np.float64]:
        counter = np.stack(
            [blocks, blocks * 0 + half, blocks * 0 + (stream & 0xFFFFFFFF), blocks * 0 + (stream >> 32)], -1
        )
        return philox(counter.astype(np.uint64), seed).reshape(-1)[:v].astype(np.float64)

    bits, more = words(0), words(1)
    uniform = np.where(bits < 2**16, bits + (more + 0.5) / 2**32, bits + 0.5) / 2**32
    return -np.log(-np.log1p(-uniform))


def hard_row(name: str, z: NDArray[np.float64], rng: np.random.Generator, dtype: str) -> None:
    v = len(z)
    if name == "offset":
        z += 1e4 if dtype == "fp32" else 500
    elif name == "holes":
        z[rng.random(v) < 0.5] = -INF
        z[v // 2] = 1
    elif name == "one":
        z[:] = -INF
        z[v // 2] = -3
    elif name == "nothing":
        z[:] = -INF
    elif name == "nan":
        z[v // 3] = np.nan
    elif name == "inf":
        z[v // 3] = INF
    elif name == "flat":
        z[:] = 0.5
    elif name == "low":
        z -= 150


def run(library: Path, case: Case, limits: Limits | None = None) -> None:
    """Runs the case, with `limits` by way of row_sample_cuda. AssertionError where float64 says something else."""
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    n, v = len(case.rows), case.v
    z = rng.normal(0, 3, (n, v))
    for i, name in enumerate(case.rows):
        hard_row(name, z[i], rng, case.dtype)
    logits = place((n, v), encode(z[:1], case.dtype), case.offset, v + case.pad)
    logits[:] = encode(z, case.dtype)
    streams = np.arange(n, dtype=np.int64) * 3 + (1 << 35)
    seed, index, logp = np.array([case.seed]), np.full(n, -7, np.int64), np.full(n, -7, np.float32)
    addresses = (a.ctypes.data for a in (logits, seed, streams, index, logp))
    call = CRowSample(*addresses, n, v, v + case.pad, CODES[case.dtype], case.scale, case.softcap)
    loaded = build.load(library)
    if limits:
        error = loaded.c_sample_run(ctypes.byref(call), ctypes.byref(limits))
    else:
        plan = Plan(case.threads, case.slices, case.rows_per_launch)
        error = loaded.c_sample(ctypes.byref(call), ctypes.byref(plan))
    if error:
        raise RuntimeError(error.decode())
    for i, name in enumerate(case.rows):
        judge(case, f"{case}: row {i} ({name})", decode(logits[i], case.dtype), int(streams[i]), int(index[i]), logp[i])


def judge(case: Case, what: str, logits: Any, stream: int, index: int, logp: Any) -> None:
    """The token of the largest key, but for keys that fp32 cannot tell apart; and its log-probability."""
    with np.errstate(all="ignore"):
        z = (logits.astype(np.float32) * np.float32(case.scale)).astype(np.float64)
        z = case.softcap * np.tanh(z / case.softcap) if case.softcap else z
        z = np.where(logits == -INF, -INF, z)
        lse = np.max(z) + np.log(np.sum(np.exp(z - np.max(z))))
    if not np.isfinite(lse):
        assert index == -1 and np.isnan(logp), f"{what}: drew {index}, log p {logp}, and there is no distribution"
        return
    key = z + gumbel(case.seed, stream, case.v)
    assert 0 <= index < case.v, f"{what}: drew {index}"
    assert key[index] >= np.max(key) - 5e-6, (
        f"{what}: drew {index} of key {key[index]}, not {np.argmax(key)} of {np.max(key)}"
    )
    close(f"{what} log p", logp, z[index] - lse, 3e-6 * (1 + abs(z[index] - lse)) + (1e-5 if case.softcap else 0))


def small_cases() -> list[Case]:
    """For the sanitizers: every loop and barrier, with ends of rows at ends of memory."""
    return [
        Case(1, slices=2),
        Case(37, "bf16", offset=3),
        Case(2049, slices=2, offset=1, pad=1),
        Case(1201, "fp16", slices=4, scale=0.7, softcap=20),
        Case(700, "bf16", slices=3, threads=32, rows_per_launch=2),
    ]


def main() -> None:
    """Entry point of the sanitizer runs."""
    for case in small_cases():
        run(Path(sys.argv[1]), case)


if __name__ == "__main__":
    main()
