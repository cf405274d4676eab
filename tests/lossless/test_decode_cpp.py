"""The C++ decoders against the reference: what the reference encodes comes back, bit for bit, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from fastloss import backend_cpp, registry
from fastloss.compiled import _C, MISSING
from fastloss.lossless import header, reference
from fastloss.lossless.compress import _crc, _p7, _r8, compress
from fastloss.lossless.compressed_tensor import CompressedTensor
from fastloss.lossless.contract import BLOCK, NUMBERS, P7_NUMBERS, PLAN_HEAD, Codec, Layout, Section
from fastloss.lossless.cpp_decode import (
    lossless_decode,
    lossless_decode_checked,
    lossless_decode_into,
    lossless_rows,
    lossless_verify,
)
from fastloss.lossless.tiles import to_tiles
from lossless_cases import CODED, INTEGERS, SIZES, bits, constant, every_pattern, mostly_normal, normal, uniform_bits

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING}")
#: Levels 2 and 3 of csrc/cpu/cpu.h differ in their rounding to bf16 alone.
ISAS = () if _C is None else sorted({0, min(1, _C.best_isa()), _C.best_isa()})
CODECS = [
    (dtype, codec)
    for codec in (Codec.P7, Codec.R8)
    for dtype in CODED
    if codec == Codec.R8 or NUMBERS[dtype] in P7_NUMBERS
]
BOTH = pytest.mark.parametrize(("dtype", "codec"), CODECS, ids=[f"{str(d)[6:]}-{c.name}" for d, c in CODECS])


@pytest.fixture(params=ISAS, autouse=True)
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
        parts = (_p7 if codec == Codec.P7 else _r8)(flat, x.dim())[0]
    parts[Section.BLOCK_CRC] = _crc(flat)  # the reference's takes a second: test_crc32c looks at this one's
    return CompressedTensor(*header.build(codec, layout, x.dtype, x.shape, parts))


def decoded(c: CompressedTensor, first: int = 0, count: int | None = None) -> Tensor:
    return lossless_decode(c.blob, c.plan, first, c.numel() - first if count is None else count, c.dtype)


def checked(c: CompressedTensor) -> tuple[Tensor, int]:
    out = torch.empty(c.numel(), dtype=c.dtype)
    bad = lossless_decode_checked(c.blob, c.plan, out)
    assert lossless_verify(c.blob, c.plan, c.dtype) == bad
    return out, bad


MAKERS: dict[str, Callable[[int, torch.dtype], Tensor]] = {
    "normal": normal, "uniform": uniform_bits, "escapes": mostly_normal, "constant": constant,
    "zeros": lambda count, dtype: torch.zeros(count).to(dtype),
    "bf16 in fp32": lambda count, dtype: normal(count, dtype).to(torch.bfloat16).to(dtype),
    "all planes coded": lambda count, dtype: (uniform_bits(count, dtype).view(torch.uint8) & 0x55).view(dtype),
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


def repeated(block: CompressedTensor, times: int) -> CompressedTensor:
    """A tensor of one block many times: the reference would take long."""
    parts = {k: block.blob[at : at + n] for k, (at, n, _) in block.header.sections.items()}

    def offsets(each: int) -> Tensor:
        return (torch.arange(times + 1) * each).view(torch.uint8)

    shared = {Section.TABLE, *range(Section.FIELD_FREQUENCIES, Section.RAW, 3)}
    many = {k: p if k in shared else p.repeat(times) for k, p in parts.items()}
    for kind in range(Section.FIELD_FREQUENCIES, Section.RAW, 3):
        if kind in parts:
            many[Section(kind + 1)] = offsets(parts[Section(kind + 2)].numel())
    if Section.ESCAPE_OFFSETS in parts:
        many[Section.ESCAPE_OFFSETS] = offsets(len(parts.get(Section.ESCAPE_POSITIONS, ())) // 2)
    return CompressedTensor(*header.build(block.header.codec, Layout.ROWS, block.dtype, (times * BLOCK,), many))


@pytest.mark.parametrize("kind", ["normal", "escapes", "uniform"])
@pytest.mark.parametrize("codec", [Codec.P7, Codec.R8])
@pytest.mark.parametrize("times", [19, 133, 331])
def test_large(codec: Codec, times: int, kind: str) -> None:
    """Several blocks side by side; beyond 2 and 4 MiB numbers pass the cache by, to any address."""
    x, block = made(kind, BLOCK, torch.bfloat16, codec)
    c, want = repeated(block, times), x.view(torch.int16).repeat(times)
    assert torch.equal(decoded(c).view(torch.int16), want)
    out, bad = checked(c)
    assert bad == -1
    assert torch.equal(out.view(torch.int16), want)
    for first, count in ((77, c.numel() - 100), (8 * BLOCK, 9 * BLOCK), (BLOCK + 32, c.numel() - BLOCK - 32)):
        assert torch.equal(decoded(c, first, count).view(torch.int16), want[first : first + count])
    for skipped in (1, 32):
        room = torch.full((c.numel() + skipped + 1,), 0.5, dtype=x.dtype)
        into = room[skipped:-1]
        assert lossless_decode_checked(c.blob, c.plan, into) == -1
        assert torch.equal(into.view(torch.int16), want)
        into.zero_()
        lossless_decode_into(c.blob, c.plan, into)
        assert torch.equal(into.view(torch.int16), want)
        assert (room[:skipped] == 0.5).all() and room[-1] == 0.5


def few_escapes(count: int, dtype: torch.dtype) -> Tensor:
    """One exponent, and more rare ones than a table of pairs has room for."""
    return torch.where(torch.arange(count) % 64 == 5, uniform_bits(count, dtype).float(), 1.5).to(dtype)


MAKERS["few escapes"] = few_escapes


@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize(
    ("kind", "dtype", "codec"),
    [
        ("escapes", torch.float8_e4m3fn, Codec.R8),
        ("escapes", torch.float16, Codec.R8),
        ("all planes coded", torch.bfloat16, Codec.R8),
        ("all planes coded", torch.float32, Codec.R8),
        ("few escapes", torch.bfloat16, Codec.P7),
        ("few escapes", torch.float32, Codec.P7),
    ],
)
def test_large_in_pieces(kind: str, dtype: torch.dtype, codec: Codec, skipped: int) -> None:
    """What passes the cache by is decoded in pieces of a block, but for lines that are not whole."""
    x, block = made(kind, BLOCK, dtype, codec)
    if codec == Codec.P7:
        assert 0 < block.plan[PLAN_HEAD + 2 * Section.ESCAPE_POSITIONS + 1] // 2 <= 64
    times = 5 * 2**20 // (BLOCK * dtype.itemsize)
    c, want = repeated(block, times), bits(x).repeat(times)
    out = torch.zeros(c.numel() + 64, dtype=dtype)[skipped : c.numel() + skipped]
    lossless_decode_into(c.blob, c.plan, out)
    assert torch.equal(bits(out), want)
    bits(out).zero_()
    assert lossless_decode_checked(c.blob, c.plan, out) == -1
    assert torch.equal(bits(out), want)
    for first in (BLOCK + 64, 3 * BLOCK + 2049):
        whole = slice(first * dtype.itemsize, (c.numel() - 3) * dtype.itemsize)
        assert torch.equal(bits(decoded(c, first, c.numel() - 3 - first)), want[whole])


def test_bad_block_of_many() -> None:
    """The first of two wrong checksums, wherever its block stands among those that are decoded side by side."""
    for dtype in (torch.bfloat16, torch.float8_e5m2):
        c = repeated(made("normal", BLOCK, dtype, Codec.R8)[1], 19)
        at = c.header.sections[Section.BLOCK_CRC][0]
        for first, second in ((0, 7), (3, 4), (7, 8), (15, 18), (17, 18)):
            blob = c.blob.clone()
            blob[at + 4 * first] ^= 1
            blob[at + 4 * second] ^= 1
            assert lossless_verify(blob, c.plan, dtype) == first
            assert lossless_decode_checked(blob, c.plan, torch.empty(c.numel(), dtype=dtype)) == first


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
    for changed in (c.blob[:-128], c.blob[:0]):
        with pytest.raises(ValueError, match="does not lie within the blob's"):
            lossless_decode_checked(changed, c.plan, torch.empty_like(x))
        with pytest.raises(ValueError, match="does not lie within the blob's"):
            lossless_decode_into(changed, c.plan, torch.empty_like(x))
        with pytest.raises(ValueError, match="does not lie within the blob's"):
            lossless_verify(changed, c.plan, x.dtype)
    unchecked = c.plan.copy()
    unchecked[PLAN_HEAD + 2 * Section.BLOCK_CRC :] = [0, 0]
    assert not registry.able("lossless_verify", c.blob, unchecked, x.dtype)


def test_unaligned_blob() -> None:
    x, c = made("escapes", 20000, torch.bfloat16, Codec.P7)
    moved = torch.cat((torch.zeros(3, dtype=torch.uint8), c.blob))[3:]
    assert torch.equal(bits(lossless_decode(moved, c.plan, 0, 20000, x.dtype)), bits(x))
    spaced = c.blob.repeat_interleave(2)[::2]
    assert torch.equal(bits(lossless_decode(spaced, c.plan, 0, 20000, x.dtype)), bits(x))


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_hostile_content(dtype: torch.dtype, codec: Codec, seed: int) -> None:
    """Random sections decode to the same on all instruction sets, P7's to what the reference makes of them."""
    _, c = made("escapes", 32769, dtype, codec)
    blob, want = _hostile(dtype, codec, seed)
    assert torch.equal(bits(lossless_decode(blob, c.plan, 0, c.numel(), dtype)), want)
    assert checked(CompressedTensor(blob, c.header))[1] == 0


@cache
def _hostile(dtype: torch.dtype, codec: Codec, seed: int) -> tuple[Tensor, Tensor]:
    _, c = made("escapes", 32769, dtype, codec)
    head = min(at for at, _, _ in c.header.sections.values())
    noise = uniform_bits(c.nbytes - head, torch.float8_e5m2, seed).view(torch.uint8)
    blob = torch.cat((c.blob[:head], noise))
    if seed:  # offsets that mean something
        for k in (Section.ESCAPE_OFFSETS, *range(Section.FIELD_OFFSETS, Section.RAW, 3)):
            at, count, _ = c.header.sections.get(k, (0, 0, 0))
            blob[at : at + count] = c.blob[at : at + count]
    if codec == Codec.P7:
        return blob, bits(reference.lossless_decode(blob, c.plan, 0, c.numel(), dtype))
    before, backend_cpp.ISA = backend_cpp.ISA, 0
    scalar = lossless_decode(blob, c.plan, 0, c.numel(), dtype)
    backend_cpp.ISA = before
    return blob, bits(scalar)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


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
