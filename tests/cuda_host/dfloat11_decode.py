"""Cases of dfloat11_decode on the host: an encoder of DFloat11's layout, the kernel through ctypes, equal bits.

`python -m cuda_host.dfloat11_decode LIBRARY [FAULT]` runs the small ones, with a planted fault (test_cuda_dfloat11_faults.py).
"""

from __future__ import annotations

import ctypes
import heapq
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import build
from .lossless_linear import aligned, weights
from .rows import int32, int64, pointer


class CDfloat11(ctypes.Structure):
    """fastloss::CudaDfloat11."""

    _fields_ = [
        ("luts", pointer), ("tables", int64), ("codes", pointer), ("code_bytes", int64), ("sign_mantissa", pointer),
        ("output_positions", pointer), ("gaps", pointer), ("gap_bytes", int64), ("out", pointer), ("numel", int64),
        ("threads", int32),
    ]  # fmt: skip


def huffman(counts: dict[int, int]) -> dict[int, str]:
    """The code of each symbol as a text of 0 and 1."""
    order = itertools.count()
    heap: list[Any] = [(c, next(order), s) for s, c in counts.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (a + b, next(order), (left, right)))
    found: dict[int, str] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, tuple):
            walk(node[0], prefix + "0")
            walk(node[1], prefix + "1")
        else:
            found[node] = prefix or "0"

    walk(heap[0][2], "")
    return found


def tables_of(codes: dict[int, str]) -> NDArray[np.uint8]:
    """LUTS: a table for every whole-byte prefix of a code that goes on, then lengths. What no code has repeats what is before."""
    prefixes = sorted(
        {c[: 8 * k] for c in codes.values() for k in range((len(c) - 1) // 8 + 1)}, key=lambda p: (len(p), p)
    )
    luts = np.zeros((len(prefixes) + 1, 256), np.uint8)
    taken = np.zeros(luts.shape, bool)
    for index, prefix in enumerate(prefixes[1:], 1):
        at = prefixes.index(prefix[:-8]), int(prefix[-8:], 2)
        luts[at], taken[at] = 256 - index, True
    for symbol, code in codes.items():
        whole = (len(code) - 1) // 8 * 8
        rest = code[whole:]
        first = int(rest.ljust(8, "0"), 2)
        span = prefixes.index(code[:whole]), slice(first, first + (1 << 8 - len(rest)))
        luts[span], taken[span] = symbol, True
        luts[-1, symbol] = len(code)
    for table, row in enumerate(taken[:-1]):
        for entry in np.flatnonzero(~row):
            luts[table, entry] = luts[table, max(entry - 1, 0)]
    return luts


class Stream:
    """bf16 bits in the layout of DFloat11, by a code for their exponents (Huffman's of their counts without one)."""

    def __init__(self, bits: NDArray[np.uint16], threads: int, codes: dict[int, str] | None = None) -> None:
        exponents = bits >> 7 & 255
        if codes is None:
            values, counts = np.unique(exponents, return_counts=True)
            codes = huffman({**dict(zip(values.tolist(), counts.tolist(), strict=True)), 256: 1})  # and an end
            codes.pop(256)
        text = "".join(codes[e] for e in exponents.tolist())
        starts = np.cumsum([0] + [len(codes[e]) for e in exponents.tolist()])[:-1]
        self.threads, self.bits = threads, bits
        self.codes = aligned(np.packbits(np.frombuffer(text.encode(), np.uint8) == ord("1")))
        self.luts = aligned(tables_of(codes))
        blocks = -(-self.codes.size // (8 * threads))
        first = np.searchsorted(starts, 64 * np.arange(blocks * threads))
        gap = np.append(starts, 0)[first] - 64 * np.arange(blocks * threads)
        gap = np.where(first < starts.size, gap, 0)
        self.gaps = aligned(np.packbits((gap[:, None] >> np.arange(4, -1, -1) & 1).astype(bool)))
        self.positions = aligned(np.append(first[::threads], bits.size).astype(np.uint32))
        self.sign_mantissa = aligned(((bits >> 8 & 128) | (bits & 127)).astype(np.uint8))

    def hostile(self, rng: np.random.Generator, parts: tuple[str, ...]) -> None:
        """Random bytes in some of the tensors."""
        for name in parts:
            part = getattr(self, name)
            part.view(np.uint8)[:] = rng.integers(0, 256, part.nbytes)


def decode(library: Path, stream: Stream, multiprocessors: int) -> NDArray[np.uint16]:
    """The kernel's bits, before it 0x7fc1."""
    out = aligned(np.full(stream.bits.size, 0x7FC1, np.uint16))
    call = CDfloat11(
        stream.luts.ctypes.data, stream.luts.size // 256 - 1, stream.codes.ctypes.data, stream.codes.size,
        stream.sign_mantissa.ctypes.data, stream.positions.ctypes.data, stream.gaps.ctypes.data, stream.gaps.size,
        out.ctypes.data, out.size, stream.threads,
    )  # fmt: skip
    error = build.load(library).c_dfloat11(ctypes.byref(call), multiprocessors)
    assert error is None, error
    return out


def _long() -> dict[int, str]:
    a, b, counts = 1, 1, {}
    for symbol in (0, 1, 250, 245, *range(110, 136)):
        counts[symbol] = a
        a, b = b, a + b
    return huffman(counts)


#: Codes of 1 to 29 bits in four tables, two of them for exponents that would name a table, were there so many.
LONG = _long()


@dataclass(frozen=True)
class Case:
    """`numel` numbers, decoded by blocks of `threads`."""

    numel: int
    kind: str = "normal"  # normal, constant, long
    threads: int = 64
    hostile: tuple[str, ...] = ()
    multiprocessors: int = 132

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k, None))


def stream_of(case: Case) -> Stream:
    rng = np.random.default_rng(case.numel)
    if case.kind == "long":  # every code as often as any other, so that long ones are many
        exponents = rng.choice(np.array(list(LONG)), case.numel)
        bits = rng.integers(0, 65536, case.numel) & 0x807F | exponents << 7
        return Stream(bits.astype(np.uint16), case.threads, LONG)
    bits = weights(rng, (1, case.numel), "normal")[0]
    if case.kind == "constant":
        bits = (bits & 0x807F | 120 << 7).astype(np.uint16)
    return Stream(bits, case.threads)


def run(library: Path, case: Case) -> None:
    """Runs the kernel. AssertionError where a bit is another."""
    stream = stream_of(case)
    stream.hostile(np.random.default_rng(1), case.hostile)
    found = decode(library, stream, case.multiprocessors)
    if case.hostile:  # sign and mantissa are right whatever the rest says: so every number was written
        wanted = (stream.sign_mantissa.astype(np.uint16) & 128) << 8 | (stream.sign_mantissa & 127)
        assert np.array_equal(found & 0x807F, wanted), str(case)
        return
    assert np.array_equal(found, stream.bits), f"{case}: {np.flatnonzero(found != stream.bits)[:3]}"


def small_cases() -> list[Case]:
    """One number, ends within a byte and a thread, rounds of short codes, long codes, several blocks to a block of CUDA."""
    return [
        Case(1),
        Case(7, "long"),
        Case(300, threads=32),
        Case(2048, "constant", 32),  # to the last bit of the last thread
        Case(5000, "long"),
        Case(9001, threads=128, multiprocessors=1),
        Case(3001, "long", 32, multiprocessors=1),
        Case(40001, "constant", 512),
        Case(3000, threads=32, hostile=("luts",)),
        Case(3000, "long", threads=32, hostile=("codes",)),
        Case(3000, "long", threads=32, hostile=("gaps", "codes")),
        Case(3000, threads=32, hostile=("positions",)),
        Case(3000, threads=32, hostile=("luts", "gaps", "codes", "positions")),
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
