"""The C++ decoders against the reference: what the reference encodes comes back, bit for bit, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from fastloss import backend_cpp, registry
from fastloss.compiled import _C, MISSING
from fastloss.lossless import checksum, crc32c_table, header, reference
from fastloss.lossless.compress import _crc, _p7, _r8, compress
from fastloss.lossless.compressed_tensor import CompressedTensor
from fastloss.lossless.contract import BLOCK, NUMBERS, P7_NUMBERS, PLAN_HEAD, Codec, Layout, Section
from fastloss.lossless.cpp_decode import crc32c, lossless_decode, lossless_decode_checked, lossless_rows
from fastloss.lossless.tiles import to_tiles
from lossless_cases import CODED, INTEGERS, SIZES, bits, constant, every_pattern, mostly_normal, normal, uniform_bits

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING}")
CODECS = [
    (dtype, codec)
    for codec in (Codec.P7, Codec.R8)
    for dtype in CODED
    if codec == Codec.R8 or NUMBERS[dtype] in P7_NUMBERS
]
BOTH = pytest.mark.parametrize(("dtype", "codec"), CODECS, ids=[f"{str(d)[6:]}-{c.name}" for d, c in CODECS])


@pytest.fixture(params=range(0 if _C is None else _C.best_isa() + 1), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every instruction set of this machine."""
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return int(request.param)


def encoded(x: Tensor, codec: Codec, layout: Layout = Layout.ROWS) -> CompressedTensor:
    """What the reference makes of `x`, also where raw would be smaller."""
    flat = x.reshape(-1)
    if layout == Layout.TILES:
        flat = to_tiles(flat.view(INTEGERS[x.element_size()]), x.shape[1]).view(x.dtype)
    with registry.use_backend("reference"):
        parts = _p7(flat, x.dim())[0] if codec == Codec.P7 else _r8(flat)
    parts[Section.BLOCK_CRC] = _crc(flat)  # the reference's takes a second: test_crc32c looks at this one's
    return CompressedTensor(*header.build(codec, layout, x.dtype, x.shape, parts))


def decoded(c: CompressedTensor, first: int = 0, count: int | None = None) -> Tensor:
    return lossless_decode(c.blob, c.plan, first, c.numel() - first if count is None else count, c.dtype)


def checked(c: CompressedTensor) -> tuple[Tensor, int]:
    out = torch.empty(c.numel(), dtype=c.dtype)
    return out, lossless_decode_checked(c.blob, c.plan, out)


MAKERS: dict[str, Callable[[int, torch.dtype], Tensor]] = {
    "normal": normal, "uniform": uniform_bits, "escapes": mostly_normal, "constant": constant,
    "zeros": lambda count, dtype: torch.zeros(count).to(dtype),
    "bf16 in fp32": lambda count, dtype: normal(count, dtype).to(torch.bfloat16).to(dtype),
}  # fmt: skip


@cache
def made(kind: str, count: int, dtype: torch.dtype, codec: Codec) -> tuple[Tensor, CompressedTensor]:
    x = MAKERS[kind](count, dtype)
    return x, encoded(x, codec)


@BOTH
@pytest.mark.parametrize("count", SIZES)
def test_sizes(dtype: torch.dtype, codec: Codec, count: int) -> None:
    x, c = made("escapes", count, dtype, codec)
    assert torch.equal(bits(decoded(c)), bits(x))
    out, bad = checked(c)
    assert bad == -1
    assert torch.equal(bits(out), bits(x))


@BOTH
@pytest.mark.parametrize("kind", MAKERS)
def test_numbers(dtype: torch.dtype, codec: Codec, kind: str) -> None:
    x, c = made(kind, 20000, dtype, codec)
    assert torch.equal(bits(decoded(c)), bits(x))
    assert checked(c)[1] == -1


@cache
def patterns(dtype: torch.dtype, codec: Codec) -> tuple[Tensor, CompressedTensor]:
    x = every_pattern(dtype)
    return x, encoded(x, codec)


@pytest.mark.parametrize(("dtype", "codec"), [p for p in CODECS if p[0].itemsize < 4])
def test_every_pattern(dtype: torch.dtype, codec: Codec) -> None:
    x, c = patterns(dtype, codec)
    assert torch.equal(bits(decoded(c)), bits(x))


@BOTH
def test_ranges(dtype: torch.dtype, codec: Codec) -> None:
    x, c = made("escapes", 50001, dtype, codec)
    for first, count in (
        (0, 0), (0, 1), (1, 1), (127, 2), (128, 128), (100, 60), (16383, 2), (16384, 16384), (16300, 17000), (129, 49000),
        (50000, 1), (50001, 0), (32768, 17233), (5, 127), (49999, 2),
    ):  # fmt: skip
        assert torch.equal(bits(decoded(c, first, count)), bits(x)[first * dtype.itemsize :][: count * dtype.itemsize])


@BOTH
@pytest.mark.parametrize("columns", [1, 100, 384, 1000, 20000])
def test_rows(dtype: torch.dtype, codec: Codec, columns: int) -> None:
    count = 50001 // columns * columns
    x = mostly_normal(50001, dtype)[:count].reshape(-1, columns)
    c = _rows(dtype, codec, columns)
    last = len(x) - 1
    for index in ([], [0], [last], [last, 0, last // 2, 0, last], list(range(0, last + 1, 3))):
        for kind in (torch.int64, torch.int32):
            at = torch.tensor(index, dtype=kind)
            got = lossless_rows(c.blob, c.plan, at, dtype)
            want = x.view(INTEGERS[dtype.itemsize])[at.long()]
            assert got.shape == want.shape
            assert torch.equal(bits(got), bits(want))


@cache
def _rows(dtype: torch.dtype, codec: Codec, columns: int) -> CompressedTensor:
    count = 50001 // columns * columns
    return encoded(mostly_normal(50001, dtype)[:count].reshape(-1, columns), codec)


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.complex128, torch.bfloat16, torch.bool])
def test_raw(dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (40, 1000), generator=torch.Generator().manual_seed(0)).to(dtype)
    c = compress(x, codec="raw")
    assert torch.equal(bits(decoded(c)), bits(x))
    assert torch.equal(bits(decoded(c, 16380, 8)), bits(x)[16380 * dtype.itemsize :][: 8 * dtype.itemsize])
    assert torch.equal(bits(lossless_rows(c.blob, c.plan, torch.tensor([39, 0, 16]), dtype)), bits(x[[39, 0, 16]]))
    out, bad = checked(c)
    assert bad == -1
    assert torch.equal(bits(out), bits(x))
    empty = compress(x[:0], codec="raw")
    assert decoded(empty).shape == (0,)
    assert lossless_rows(empty.blob, empty.plan, torch.empty(0, dtype=torch.int64), dtype).shape == (0, 1000)


@cache
def _tiles(dtype: torch.dtype) -> tuple[Tensor, CompressedTensor]:
    x = mostly_normal(80 * 640, dtype).reshape(80, 640)
    return x, encoded(x, Codec.P7, Layout.TILES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tiles(dtype: torch.dtype) -> None:
    x, c = _tiles(dtype)
    assert torch.equal(bits(decoded(c)), bits(x))
    for first, rows in ((0, 16), (16, 32), (64, 16), (32, 48), (80, 0)):
        assert torch.equal(bits(decoded(c, 640 * first, 640 * rows)), bits(x[first : first + rows]))
    out, bad = checked(c)
    assert bad == -1
    assert torch.equal(bits(out), bits(x))


def test_large() -> None:
    """Beyond 16 MiB numbers pass the cache by, to an address that need not be that of a line."""
    x, block = made("escapes", BLOCK, torch.bfloat16, Codec.P7)  # the reference would take long: repeat one block
    parts = {k: block.blob[at : at + n] for k, (at, n, _) in block.header.sections.items()}
    times = 576  # 18 MiB
    escapes = parts[Section.ESCAPE_POSITIONS].numel() // 2
    repeated = {k: p if k == Section.TABLE else p.repeat(times) for k, p in parts.items()}
    repeated[Section.ESCAPE_OFFSETS] = (torch.arange(times + 1) * escapes).view(torch.uint8)
    c = CompressedTensor(*header.build(Codec.P7, Layout.ROWS, x.dtype, (times * BLOCK,), repeated))
    want = x.view(torch.int16).repeat(times)
    assert torch.equal(decoded(c).view(torch.int16), want)
    out, bad = checked(c)
    assert bad == -1
    assert torch.equal(out.view(torch.int16), want)
    assert torch.equal(decoded(c, 77, c.numel() - 100).view(torch.int16), want[77:-23])
    room = torch.empty(c.numel() + 1, dtype=x.dtype)[1:]
    assert lossless_decode_checked(c.blob, c.plan, room) == -1
    assert torch.equal(room.view(torch.int16), want)


@BOTH
def test_first_bad_block(dtype: torch.dtype, codec: Codec) -> None:
    _, c = made("escapes", 50001, dtype, codec)
    at = c.plan[PLAN_HEAD + 2 * Section.BLOCK_CRC]
    for blocks, first in (([3], 3), ([2, 1], 1), ([0, 3], 0)):
        hurt = c.blob.clone()
        for b in blocks:
            hurt[at + 4 * b + b % 4] ^= 1
        out = torch.empty(c.numel(), dtype=dtype)
        assert lossless_decode_checked(hurt, c.plan, out) == first
        assert torch.equal(bits(out), bits(decoded(c)))


def test_errors() -> None:
    x, c = made("escapes", 16384, torch.bfloat16, Codec.P7)
    plan = c.plan.copy()
    plan[4:6] = 128, 128
    for row in (-1, 128, 1 << 40):
        with pytest.raises(IndexError, match=rf"row {row} is out of bounds: rows are 0\.\.127"):
            lossless_rows(c.blob, plan, torch.tensor([0, row]), x.dtype)
    spaced = torch.empty(2 * x.numel(), dtype=x.dtype)[::2]
    assert registry.choose("lossless_decode_checked", c.blob, c.plan, spaced) == "reference"
    assert registry.choose("lossless_decode_checked", c.blob, c.plan, spaced.contiguous()) == "cpp"


def test_unaligned_blob() -> None:
    x, c = made("escapes", 20000, torch.bfloat16, Codec.P7)
    moved = torch.cat((torch.zeros(3, dtype=torch.uint8), c.blob))[3:]
    assert torch.equal(bits(lossless_decode(moved, c.plan, 0, 20000, x.dtype)), bits(x))
    spaced = c.blob.repeat_interleave(2)[::2]
    assert torch.equal(bits(lossless_decode(spaced, c.plan, 0, 20000, x.dtype)), bits(x))


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_hostile_content(dtype: torch.dtype, codec: Codec, seed: int) -> None:
    """Random sections decode to what the reference makes of them: tests/fuzz_lossless.cpp looks at memory."""
    _, c = made("escapes", 32769, dtype, codec)
    head = min(c.plan[PLAN_HEAD + 2 * k] for k in Section if c.plan[PLAN_HEAD + 2 * k + 1])
    blob = c.blob.clone()
    generator = torch.Generator().manual_seed(seed)
    blob[head:] = torch.randint(0, 256, (blob.numel() - head,), dtype=torch.uint8, generator=generator)
    for k in range(Section.FIELD_FREQUENCIES, Section.RAW, 3):  # more than 256 slots have no meaning
        at, count = c.plan[PLAN_HEAD + 2 * k : PLAN_HEAD + 2 * k + 2]
        if count:
            blob[at : at + 256] = blob[at : at + 256] % 2
    if seed:  # offsets that mean something
        for k in (Section.ESCAPE_OFFSETS, *range(Section.FIELD_OFFSETS, Section.RAW, 3)):
            at, count = c.plan[PLAN_HEAD + 2 * k : PLAN_HEAD + 2 * k + 2]
            blob[at : at + count] = c.blob[at : at + count]
    want = _hostile(dtype, codec, seed, blob, c)
    assert torch.equal(bits(lossless_decode(blob, c.plan, 0, c.numel(), dtype)), want)


_KNOWN: dict[tuple[torch.dtype, Codec, int], Tensor] = {}


def _hostile(dtype: torch.dtype, codec: Codec, seed: int, blob: Tensor, c: CompressedTensor) -> Tensor:
    key = (dtype, codec, seed)
    if key not in _KNOWN:
        _KNOWN[key] = bits(reference.lossless_decode(blob, c.plan, 0, c.numel(), dtype))
    return _KNOWN[key]


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


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


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


@BOTH
def test_threads(threads: None, dtype: torch.dtype, codec: Codec) -> None:
    x, c = _long(dtype, codec)
    assert torch.equal(bits(decoded(c)), bits(x))
    out, bad = checked(c)
    assert bad == -1
    assert torch.equal(bits(out), bits(x))


@cache
def _long(dtype: torch.dtype, codec: Codec) -> tuple[Tensor, CompressedTensor]:
    x = normal(6 * BLOCK + 5, dtype)
    return x, encoded(x, codec)
