"""The lossless kernels on the host, through ctypes: arrays in, arrays out.

`python -m cuda_host.lossless LIBRARY CASES.npz [FAULT]` runs the cases that a test has written there (numpy alone: torch does
not load beside a sanitizer) and compares every byte.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import build

Bytes = NDArray[np.uint8]
int64, int32 = ctypes.c_int64, ctypes.c_int


class Memory:
    """Bytes at a multiple of 16, with nothing behind them that belongs to anyone."""

    def __init__(self, content: NDArray[Any], behind: int = 0) -> None:
        self.kept = content.reshape(-1).view(np.uint8)
        memory = np.empty(16 + self.kept.size + behind, np.uint8)
        start = -memory.ctypes.data % 16 if not behind else (behind - memory.ctypes.data) % 16
        self.block = np.frombuffer(memory, np.uint8)
        # An array of its own, so that a sanitizer sees its end: malloc gives multiples of 16.
        self.array = np.empty(self.kept.size, np.uint8)
        if self.array.ctypes.data % 16:
            self.array = memory[start : start + self.kept.size]
        self.array[:] = self.kept
        self.address = self.array.ctypes.data


def _plan(plan: Sequence[int]) -> Any:
    return (int64 * len(plan))(*plan)


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())


def decode(library: Path, blob: Bytes, plan: Sequence[int], first: int, count: int, size: int) -> Bytes:
    """Bytes of numbers first..first+count, `size` bytes each."""
    memory, out = Memory(blob), Memory(np.full(count * size, 0xA5, np.uint8))
    _check(build.load(library).c_lossless_decode(
        ctypes.c_void_p(memory.address), _plan(plan), int64(first), int64(count), ctypes.c_void_p(out.address)
    ))  # fmt: skip
    return out.array


def rows(library: Path, blob: Bytes, plan: Sequence[int], index: NDArray[Any], size: int) -> Bytes:
    """Bytes of the rows of `index`, int32 or int64."""
    memory, ids = Memory(blob), Memory(index)
    out = Memory(np.full(len(index) * plan[5] * size, 0xA5, np.uint8))
    _check(build.load(library).c_lossless_rows(
        ctypes.c_void_p(memory.address), _plan(plan), ctypes.c_void_p(ids.address), ctypes.c_bool(index.itemsize == 8),
        int64(len(index)), ctypes.c_void_p(out.address),
    ))  # fmt: skip
    return out.array


#: What a case calls, by its name.
CALLS = {"decode": decode, "rows": rows}


class Case:
    """One call: its name, its arguments, and the bytes that it must return, or None where only safety is at stake."""

    def __init__(self, call: str, arguments: Sequence[Any], want: Bytes | None) -> None:
        self.call, self.arguments, self.want = call, arguments, want

    def run(self, library: Path) -> None:
        """AssertionError where a byte differs."""
        got = CALLS[self.call](library, *self.arguments)
        if self.want is not None:
            wrong = np.flatnonzero(got != self.want) if got.shape == self.want.shape else np.array([-1])
            assert wrong.size == 0, f"{self.call}: {wrong.size} bytes differ, the first at {wrong[0]}"


def save(path: Path, cases: Sequence[Case]) -> None:
    """All cases in one file."""
    arrays: dict[str, Any] = {}
    for i, case in enumerate(cases):
        arrays[f"{i} call"] = np.array(case.call)
        for j, argument in enumerate(case.arguments):
            arrays[f"{i} argument {j}"] = np.asarray(argument)
        if case.want is not None:
            arrays[f"{i} want"] = case.want
    np.savez(path, **arrays)


def saved(path: Path) -> Iterator[Case]:
    """The other way round: whole numbers come back as such, lists as lists."""
    with np.load(path) as arrays:
        names, i = set(arrays.files), 0
        while f"{i} call" in names:
            arguments: list[Any] = []
            while (key := f"{i} argument {len(arguments)}") in names:
                value = arrays[key]
                arguments.append(int(value) if value.ndim == 0 else value)
            yield Case(str(arrays[f"{i} call"]), arguments, arrays[f"{i} want"] if f"{i} want" in names else None)
            i += 1


def plant(library: Path, number: int) -> None:
    """Turns on one fault of a library that was built with all of them; 0: none."""
    int32.in_dll(build.load(library), "_ZN8fastloss5faultE").value = number


def main() -> None:
    """Entry point of the sanitizer runs."""
    library = Path(sys.argv[1])
    if len(sys.argv) > 3:
        plant(library, int(sys.argv[3]))
    for case in saved(Path(sys.argv[2])):
        case.run(library)


if __name__ == "__main__":
    main()
