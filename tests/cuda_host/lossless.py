"""The lossless kernels on the host, through ctypes: arrays in, arrays out.

`python -m cuda_host.lossless LIBRARY CASES.npz [FAULT]` runs the cases that a test has written there (numpy alone: torch does
not load beside a sanitizer) and compares every byte.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
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


def p7_histogram(library: Path, numbers: Bytes, number: int, size: int, blocks: int) -> Bytes:
    """Counts of pairs of fields, as bytes of int64, by so many thread blocks."""
    memory, out = Memory(numbers), Memory(np.zeros(65536, np.int64))
    _check(build.load(library).c_p7_histogram(memory.address, int64(numbers.size // size), number, out.address, blocks))
    return out.array


#: Byte planes and bit planes of the kinds of numbers, by their code.
PLANES = {0: (1, 0), 1: (1, 3), 2: (3, 0), 3: (0, 4), 4: (0, 3)}


def _planes(number: int, numel: int) -> tuple[list[Memory], Memory, Any]:
    """Byte planes, bit planes, and the pointers to the former."""
    whole, (bytes_, bits) = -(-numel // 128) * 128, PLANES[number]
    planes = [Memory(np.full(whole, 0xA5, np.uint8)) for _ in range(bytes_)]
    pointers = (ctypes.c_void_p * 3)(*(p.array.ctypes.data for p in planes))
    return planes, Memory(np.full(whole // 8 * bits, 0xA5, np.uint8)), pointers


def p7_encode(library: Path, numbers: Bytes, number: int, size: int, table: Bytes) -> Bytes:
    """Codes, byte planes, bit planes, offsets, positions and values, one behind the other."""
    numel = numbers.size // size
    blocks = -(-numel // 16384)
    memory, entries = Memory(numbers), Memory(table)
    planes, bits, pointers = _planes(number, numel)
    codes, offsets = Memory(np.full(-(-numel // 128) * 56, 0xA5, np.uint8)), Memory(np.zeros(blocks + 1, np.int64))
    positions, values = Memory(np.zeros(blocks * 8192, np.uint16)), Memory(np.zeros(blocks * 16384 * size, np.uint8))
    _check(build.load(library).c_p7_encode(
        memory.address, int64(numel), number, entries.address, codes.address, pointers, bits.address, offsets.address,
        positions.address, values.address,
    ))  # fmt: skip
    count = int(offsets.array.view(np.int64)[-1])
    return np.concatenate((
        codes.array, *(p.array for p in planes), bits.array, offsets.array, positions.array[: 2 * count],
        values.array[: 2 * count * size],
    ))  # fmt: skip


def byte_split(library: Path, numbers: Bytes, number: int, size: int) -> Bytes:
    """The field, byte planes and bit planes, one behind the other."""
    numel = numbers.size // size
    memory, field = Memory(numbers), Memory(np.full(-(-numel // 128) * 128, 0xA5, np.uint8))
    planes, bits, pointers = _planes(number, numel)
    _check(build.load(library).c_byte_split(
        memory.address, int64(numel), number, field.address, pointers, bits.address
    ))  # fmt: skip
    return np.concatenate((field.array, *(p.array for p in planes), bits.array))


def byte_histogram(library: Path, plane: Bytes, numel: int, blocks: int) -> Bytes:
    """Counts of bytes, as bytes of int64, by so many thread blocks."""
    memory, out = Memory(plane), Memory(np.zeros(256, np.int64))
    _check(build.load(library).c_byte_histogram(memory.address, int64(numel), out.address, blocks))
    return out.array


def r8_encode(library: Path, plane: Bytes, frequencies: Bytes, numel: int) -> Bytes:
    """Offsets and data, one behind the other."""
    blocks = -(-numel // 16384)
    memory, table = Memory(plane), Memory(frequencies)
    offsets, data = Memory(np.zeros(blocks + 1, np.int64)), Memory(np.zeros(blocks * (64 + 2 * 16384), np.uint8))
    _check(build.load(library).c_r8_encode(memory.address, int64(numel), table.address, offsets.address, data.address))
    return np.concatenate((offsets.array, data.array[: int(offsets.array.view(np.int64)[-1])]))


#: What a case calls, by its name.
CALLS: dict[str, Callable[..., Bytes]] = {
    "decode": decode, "rows": rows, "crc32c": crc32c, "p7_histogram": p7_histogram, "p7_encode": p7_encode,
    "byte_split": byte_split, "byte_histogram": byte_histogram, "r8_encode": r8_encode,
}  # fmt: skip


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
