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
    """A copy of bytes that ends where its memory ends, at a multiple of 16 (malloc's, and a sanitizer's)."""

    def __init__(self, content: NDArray[Any], offset: int = 0) -> None:
        flat = content.reshape(-1).view(np.uint8)
        self.memory = np.empty(offset + flat.size, np.uint8)
        assert self.memory.ctypes.data % 16 == 0
        self.array = self.memory[offset:]
        self.array[:] = flat
        self.address = ctypes.c_void_p(self.array.ctypes.data)


def _plan(plan: Sequence[int]) -> Any:
    return (int64 * len(plan))(*plan)


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())


def decode(library: Path, blob: Bytes, plan: Sequence[int], first: int, count: int, size: int) -> Bytes:
    """Bytes of numbers first..first+count, `size` bytes each."""
    memory, out = Memory(blob), Memory(np.full(count * size, 0xA5, np.uint8))
    _check(build.load(library).c_lossless_decode(
        memory.address, _plan(plan), int64(first), int64(count), out.address
    ))  # fmt: skip
    return out.array


def rows(library: Path, blob: Bytes, plan: Sequence[int], index: NDArray[Any], size: int) -> Bytes:
    """Bytes of the rows of `index`, int32 or int64."""
    memory, ids = Memory(blob), Memory(index)
    out = Memory(np.full(len(index) * plan[5] * size, 0xA5, np.uint8))
    _check(build.load(library).c_lossless_rows(
        memory.address, _plan(plan), ids.address, ctypes.c_bool(index.itemsize == 8),
        int64(len(index)), out.address,
    ))  # fmt: skip
    return out.array


def crc32c(library: Path, data: Bytes, block: int, offset: int) -> Bytes:
    """Checksums, as bytes of int64; the data begin `offset` bytes behind a multiple of 16."""
    memory, out = Memory(data, offset), Memory(np.full(-(-data.size // block), -1))
    _check(build.load(library).c_crc32c(memory.address, int64(data.size), int64(block), out.address))
    return out.array


#: What a case calls, by its name.
CALLS = {"decode": decode, "rows": rows, "crc32c": crc32c}


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
