"""CRC-32C in C++ against a table and against the polynomial itself, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from fastloss import backend_cpp, registry
from fastloss.compiled import _C, MISSING
from fastloss.lossless import checksum, crc32c_table
from fastloss.lossless.cpp_decode import crc32c
from lossless_cases import uniform_bits

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING}")


@pytest.fixture(params=range(0 if _C is None else _C.best_isa() + 1), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every instruction set of this machine."""
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return int(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 127, 128, 129, 511, 512, 513, 777, 4096, 10001])
def test_crc32c(size: int) -> None:
    data = uniform_bits(size, torch.float8_e5m2, seed=size).view(torch.uint8)
    for block in (1, 3, 64, 513, 5000, 1 << 62):
        assert torch.equal(crc32c(data, block), _crcs(size, block, data))
    assert crc32c(data[1:], 600).tolist() == crc32c_table.of_blocks(data[1:], 600).tolist()


_CRCS: dict[tuple[int, int], Tensor] = {}


def _crcs(size: int, block: int, data: Tensor) -> Tensor:
    if (size, block) not in _CRCS:
        _CRCS[size, block] = crc32c_table.of_blocks(data, min(block, max(size, 1)))
    return _CRCS[size, block]


@pytest.mark.parametrize("size", [0, 1, 9, 63, 64, 65, 300, 1000])
def test_one_checksum(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bytes and of a tensor, strided too, as by the table; which is what the reference uses."""
    data = uniform_bits(2 * size, torch.float8_e5m2, seed=size).view(torch.uint8)
    for part in (data[:size], data[::2]):
        content = bytes(part.tolist())
        assert checksum.of_bytes(content) == checksum.of(part) == crc32c_table.of_bytes(content)
    monkeypatch.setattr(crc32c_table, "of_bytes", lambda data: -1)
    assert checksum.of_bytes(content) != -1
    with registry.use_backend("reference"):
        assert checksum.of_bytes(content) == -1


def test_crc32c_of_many_pieces(threads: None, isa: int) -> None:
    """A long block is dealt to threads: its pieces are joined."""
    data = uniform_bits(1_500_000, torch.float8_e5m2).view(torch.uint8)
    assert (
        checksum.of_bytes(b"123456789")
        == 0xE3069283
        == int(crc32c(torch.tensor(list(b"123456789"), dtype=torch.uint8), 9)[0])
    )
    for block in (1_500_000, 1 << 62, 600_001, 262_144, 262_145):
        want = [_whole(data[i : i + block]) for i in range(0, data.numel(), block)]
        assert crc32c(data, block).tolist() == want


def _whole(data: Tensor) -> int:
    """By the definition of the polynomial: the remainders of parts, joined by powers of x."""
    parts = crc32c_table.of_blocks(data, 1000).tolist()
    total = 0
    for i, part in enumerate(parts):
        total = _times(total, _power(8 * min(1000, data.numel() - 1000 * i))) ^ part
    return total


def _times(a: int, b: int) -> int:
    total = 0
    for bit in range(31, -1, -1):
        total ^= b if a >> bit & 1 else 0
        b = b >> 1 ^ (0x82F63B78 if b & 1 else 0)
    return total


@cache
def _power(n: int) -> int:
    one = 1 << 31
    if n < 32:
        return one >> n
    half = _power(n // 2)
    return _times(_times(half, half), _power(n % 2))
