"""The lossless ops of the Triton backend, interpreted: bit for bit what was encoded, whatever the range, and nothing read or written
outside the tensors of a launch, whatever the blob holds.

The interpreter takes some 10 ms a step of R8, so streams are short here; one has whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

import fastloss
import lossless_cases as cases
from fastloss import lossless
from fastloss.lossless import header
from fastloss.lossless.compress import _crc, _p7, _r8
from fastloss.lossless.contract import PLAN_HEAD, SLACK, Codec, Layout, Section
from fastloss.lossless.tiles import to_tiles

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
OPS = torch.ops.fastloss
P7, R8 = Codec.P7, Codec.R8


class Outside(Exception):
    """An access outside the tensors of a launch."""


def extent(t: Tensor) -> int:
    """The bytes from the first number of a tensor to the end of the last."""
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() if t.numel() else 0


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every address of every load and store lies in a tensor of the launch; loads may reach a blob's slack."""
    spans: list[tuple[int, int]] = []
    builder = interpreter.InterpreterBuilder
    arguments = interpreter.GridExecutor._init_args_hst

    def remember(self: Any, args: Any, kwargs: Any) -> Any:
        given, named = arguments(self, args, kwargs)
        tensors = [t for t in (*given, *named.values()) if isinstance(t, Tensor)]
        spans[:] = [(t.data_ptr(), t.data_ptr() + extent(t)) for t in tensors]
        return given, named

    def check(pointers: Any, mask: Any, slack: int) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at = np.broadcast_to(pointers.data, np.shape(mask.data))[np.asarray(mask.data) != 0].astype(np.int64)
        inside = np.zeros(at.shape, bool)
        for begin, end in spans:
            inside |= (at >= begin) & (at + size <= end + slack)
        if not inside.all():
            raise Outside(f"{int((~inside).sum())} addresses, element of {size} bytes")

    def watched(name: str, mask_at: int, slack: int) -> None:
        plain = getattr(builder, name)

        def access(self: Any, *args: Any) -> Any:
            check(args[1 if name == "create_atomic_rmw" else 0], args[mask_at], slack)
            return plain(self, *args)

        monkeypatch.setattr(builder, name, access)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", remember)
    watched("create_masked_load", 1, SLACK)
    watched("create_masked_store", 2, 0)
    watched("create_atomic_rmw", 3, 0)


def run(op: str, *args: Any, backend: str = "triton") -> Any:
    with fastloss.use_backend(backend):
        return fastloss.registry.run(op, *args) if op == "lossless_decode_checked" else getattr(OPS, op)(*args)


def packed(x: Tensor, codec: Codec, layout: Layout = Layout.ROWS) -> lossless.CompressedTensor:
    """The blob of a codec, though it be larger than raw."""
    with fastloss.use_backend("reference"):
        flat = x.reshape(-1)
        if layout == Layout.TILES:
            flat = to_tiles(flat.view(cases.INTEGERS[x.element_size()]), x.shape[1]).view(x.dtype)
        parts = _p7(flat) if codec == P7 else _r8(flat)
        parts[Section.BLOCK_CRC] = _crc(flat)
        return lossless.CompressedTensor(*header.build(codec, layout, x.dtype, x.shape, parts))


def decoded(c: lossless.CompressedTensor, first: int = 0, count: int | None = None) -> Tensor:
    return run("lossless_decode", c.blob, c.plan, first, c.numel() - first if count is None else count, c.dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(cases.bits(a), cases.bits(b))


def sparse(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix of weights of which one in 50 is large and one in 50 is zero: some hundred escapes."""
    w = cases.normal(rows * columns, torch.float32, 5)
    pick = torch.rand(w.shape, generator=torch.Generator().manual_seed(6))
    return torch.where(pick < 0.02, 300 * w, torch.where(pick > 0.98, 0, w)).to(dtype).reshape(rows, columns)


def test_an_access_outside_is_seen(bounds: None) -> None:
    @triton.jit
    def beyond(x, y):
        tl.store(y + 1, tl.load(x + 64))

    x = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(Exception, match="Outside"):
        beyond[(1,)](x, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [cases.normal, cases.mostly_normal, cases.uniform_bits, cases.constant])
def test_p7(dtype: torch.dtype, make: Callable[..., Tensor]) -> None:
    for n in (1, 2, 129, 3000 if make is cases.uniform_bits else 18001):
        x = make(n, dtype)
        c = packed(x, P7)
        assert same(decoded(c), x)
    for first, count in ((n - 1, 1), (n - 1500, 1300)):
        assert same(decoded(c, first, count), x[first : first + count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_pattern(dtype: torch.dtype) -> None:
    x = cases.every_pattern(dtype)
    assert same(decoded(packed(x, P7)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_p7_tiles(dtype: torch.dtype) -> None:
    for rows, columns in ((16, 128), (48, 640)):
        x = cases.mostly_normal(rows * columns, dtype).reshape(rows, columns)
        c = packed(x, P7, Layout.TILES)
        assert same(decoded(c).reshape(rows, columns), x)
        assert same(decoded(c, 16 * columns * (rows > 16), 16 * columns), x[16 * (rows > 16) :][:16].reshape(-1))


@pytest.mark.parametrize("dtype", cases.CODED, ids=str)
@pytest.mark.parametrize("make", [cases.normal, cases.mostly_normal, cases.uniform_bits, cases.constant])
def test_r8(dtype: torch.dtype, make: Callable[..., Tensor]) -> None:
    for n in (1, 70):
        x = make(n, dtype)
        c = packed(x, R8)
        assert same(decoded(c), x)
    assert same(decoded(c, 31, 34), x[31:65])


@pytest.mark.parametrize("dtype", cases.CODED[1:], ids=str)
def test_r8_of_a_later_block(dtype: torch.dtype) -> None:
    x = cases.mostly_normal(16384 + 70, dtype)
    c = packed(x, R8)
    assert same(decoded(c, 16384 + 9, 60), x[16384 + 9 : 16384 + 69])


def test_r8_of_whole_blocks() -> None:
    x = cases.mostly_normal(16384 + 70, torch.bfloat16)
    assert same(decoded(packed(x, R8)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2], ids=str)
def test_coded_and_absent_planes(dtype: torch.dtype) -> None:
    """Of fp32 two byte planes are zero; then a few kinds of bytes, which are coded."""
    x = cases.normal(100, torch.bfloat16).to(dtype)
    for codec in (P7, R8) if dtype.itemsize > 1 else (R8,):
        assert same(decoded(packed(x, codec)), x)
    if dtype.itemsize > 1:
        few = (cases.normal(100, dtype).view(cases.INTEGERS[dtype.itemsize]) & ~0x7C7C7C).view(dtype)
        c = packed(few, R8)
        assert Section.BYTES0_DATA in c.header.sections and same(decoded(c), few)


def test_raw() -> None:
    for x in (
        cases.uniform_bits(300, torch.float32),
        torch.arange(30).reshape(5, 6),
        torch.rand(7) < 0.5,
        torch.empty(0, 3),
    ):
        c = lossless.compress(x, "raw")
        assert same(decoded(c).reshape(x.shape), x)
        if x.numel():
            assert same(decoded(c, 2, 3), x.reshape(-1)[2:5])
    x = torch.randn(5, 6, dtype=torch.complex64)
    assert same(
        run("lossless_rows", lossless.compress(x).blob, lossless.compress(x).plan, torch.tensor([3, 3]), x.dtype),
        x[[3, 3]],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [7, 600])
def test_rows_of_p7(dtype: torch.dtype, columns: int) -> None:
    rows = 18000 // columns
    x = cases.mostly_normal(rows * columns, dtype).reshape(rows, columns)
    c = packed(x, P7)
    index = torch.tensor([rows - 1, 0, 16384 // columns])
    assert same(run("lossless_rows", c.blob, c.plan, index.int(), dtype), x[index])
    assert run("lossless_rows", c.blob, c.plan, index[:0], dtype).shape == (0, columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_rows_of_r8(dtype: torch.dtype) -> None:
    """Rows of the last, short block only: the long ones are not decoded, or this would take minutes."""
    x = cases.mostly_normal(16384 * 2 + 152, dtype)
    x = x[: x.numel() // 40 * 40].reshape(-1, 40)
    index = torch.tensor([x.shape[0] - 1, x.shape[0] - 3, x.shape[0] - 1])
    c = packed(x, R8)
    assert same(run("lossless_rows", c.blob, c.plan, index, dtype), x[index])


def test_rows_that_there_are_not() -> None:
    from fastloss.triton_kernels import lossless_rows
    from fastloss.triton_kernels.lossless_numbers import read_plan

    x = cases.mostly_normal(600, torch.bfloat16).reshape(20, 30)
    for c in (packed(x, P7), packed(x, R8), lossless.compress(x, "raw")):
        for bad in (20, -1, 1 << 40):
            with pytest.raises(IndexError, match=str(bad)):
                run("lossless_rows", c.blob, c.plan, torch.tensor([1, bad]), x.dtype)
        got = lossless_rows.lossless_rows(read_plan(c.blob, c.plan), torch.tensor([-1, 3, 20, 1 << 40]), x.dtype)
        assert same(got[1], x[3]) and bool((got[[0, 2, 3]].view(torch.int16) == -1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "layout"), [(33, 500, 0), (33, 52, 0), (48, 384, 0), (48, 384, 1)])
def test_linear(dtype: torch.dtype, rows: int, columns: int, layout: int) -> None:
    w = sparse(rows, columns, dtype)
    c = packed(w, P7, Layout(layout))
    assert columns == 52 or c.header.sections[Section.ESCAPE_POSITIONS][1] > 100
    bias = torch.randn(rows).to(dtype)
    for batch in (1, 2, 5, 33) if dtype == torch.float16 and columns == 500 else (1, 5):
        x = torch.randn(batch, columns + 3).to(dtype)[:, :columns]
        y = run("lossless_linear", x, c.blob, c.plan, bias if batch != 2 else None)
        want = x.double() @ w.double().T + (bias.double() if batch != 2 else 0)
        step = 2**-7 if dtype == torch.bfloat16 else 2**-10  # the interpreter rounds halves of bfloat16 up
        torch.testing.assert_close(y.double(), want, rtol=step, atol=1e-3)


def test_linear_keeps_fp32_sums() -> None:
    """One weight of a row that is an escape, one that is not; splits; more rows than the kernel takes."""
    from fastloss.triton_kernels import lossless_linear
    from fastloss.triton_kernels.lossless_numbers import read_plan

    w = sparse(32, 768, torch.float16)
    x = torch.randn(2, 768).half()
    p = read_plan(*(lambda c: (c.blob, c.plan))(packed(w, P7)))
    want = x.float() @ w.float().T
    for batch, tile in ((1, (16, 256, 1, 4)), (2, (32, 128, 2, 4)), (2, (32, 128, 16, 4))):
        y = lossless_linear.lossless_linear(x[:batch], p, None, tile=lossless_linear.LinearTile(*tile), splits=3)
        torch.testing.assert_close(y.float(), want[:batch], rtol=2**-10, atol=1e-4)
    one = torch.zeros(1, 768).half()
    for column in (0, 1, 130, 767):
        one[0].fill_(0)[column] = 1
        assert torch.equal(lossless_linear.lossless_linear(one, p, None)[0], w[:, column])


def test_linear_that_is_not_fused() -> None:
    for w, codec in (
        (sparse(6, 40, torch.bfloat16), R8),
        (sparse(6, 41, torch.float16), P7),
        (sparse(6, 40, torch.float32), P7),
    ):
        c = packed(w, codec)
        for batch in (0, 3, 65):
            x = torch.randn(batch, w.shape[1]).to(w.dtype)
            assert same(run("lossless_linear", x, c.blob, c.plan), torch.nn.functional.linear(x, w))


@pytest.mark.parametrize(
    ("size", "block"), [(0, 5), (1, 1), (5, 3), (1000, 1000), (3000, 1 << 40), (40000, 32768), (50001, 16384)]
)
def test_crc32c(size: int, block: int) -> None:
    data = cases.uniform_bits(size + 1, torch.uint8)[1:]
    got = run("crc32c", data, block)
    assert torch.equal(got, run("crc32c", data, block, backend="reference")) and got.dtype == torch.int64


def test_decompress_checks_every_block() -> None:
    tiled = packed(sparse(32, 640, torch.float16), P7, Layout.TILES)
    for x, c in (
        (cases.mostly_normal(17000, torch.bfloat16), None), (cases.normal(60, torch.float8_e4m3fn), R8),
        (sparse(32, 640, torch.float16), tiled), (torch.arange(17000, dtype=torch.int16), None),
    ):  # fmt: skip
        c = c if isinstance(c, lossless.CompressedTensor) else packed(x, c) if c else lossless.compress(x)
        kind = next(k for k in (Section.BYTES0, Section.RAW, Section.BITS) if k in c.header.sections)
        offset, count, _ = c.header.sections[kind]
        last = (c.numel() - 1) // 16384
        bad = c.blob.clone()
        bad[offset + (count - 1 if last == 0 else count * 3 // 4)] ^= 1
        with fastloss.use_backend("triton"):
            assert same(lossless.decompress(c), x)
            if kind != Section.BITS or last:
                with pytest.raises(lossless.CorruptError) as error:
                    lossless.decompress(lossless.CompressedTensor(bad, c.header))
                assert error.value.block in range(last + 1)


def hostile(c: lossless.CompressedTensor, seed: int, small: bool) -> Tensor:
    """The blob with random bytes in every section; `small`: offsets that lie near the list."""
    blob = c.blob.clone()
    generator = torch.Generator().manual_seed(seed)
    for kind, (offset, count, _) in c.header.sections.items():
        noise = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        if small and kind in (Section.ESCAPE_OFFSETS, *range(Section.FIELD_OFFSETS, Section.RAW, 3)):
            most = c.header.sections[kind + 1][1] if kind + 1 in c.header.sections else 1
            noise = torch.randint(-2, most + 3, (count // 8,), generator=generator).view(torch.uint8)
        blob[offset : offset + count] = noise
    return blob


def embedded(blob: Tensor, fill: int, at: int) -> tuple[Tensor, Tensor]:
    """(a larger buffer, the blob within it)."""
    room = torch.full((at + blob.numel() + 256,), fill, dtype=torch.uint8)
    view = room[at : at + blob.numel()]
    view.copy_(blob)
    return room, view


def calls(c: lossless.CompressedTensor) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    rows, columns = c.header.matrix
    n = c.numel()
    yield "decode", lambda blob: run("lossless_decode", blob, c.plan, 0, n, c.dtype)
    if c.layout == Layout.ROWS:
        yield "range", lambda blob: run("lossless_decode", blob, c.plan, 5, n - 9, c.dtype)
        index = torch.tensor([0, rows - 1])
        yield "rows", lambda blob: run("lossless_rows", blob, c.plan, index, c.dtype)
    if c.codec == P7 and c.dtype != torch.float32:
        x = torch.ones(3, columns).to(c.dtype)
        if columns < 500:
            yield "linear", lambda blob: run("lossless_linear", x, blob, c.plan)
        yield "linear of a row", lambda blob: run("lossless_linear", x[:1], blob, c.plan)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(
    ("dtype", "codec", "shape", "layout"),
    [
        (torch.bfloat16, P7, (30, 560), 0), (torch.float16, P7, (5, 100), 0), (torch.float32, P7, (5, 101), 0),
        (torch.bfloat16, P7, (16, 128), 1), (torch.bfloat16, R8, (3, 30), 0), (torch.float32, R8, (2, 30), 0),
        (torch.float8_e4m3fn, R8, (3, 30), 0),
    ],
)  # fmt: skip
def test_hostile_content(
    bounds: None, dtype: torch.dtype, codec: Codec, shape: tuple[int, int], layout: int, small: bool
) -> None:
    """Valid plans of nonsense: the fixture sees every address, nothing around the blob changes a result or is changed."""
    c = packed(cases.mostly_normal(shape[0] * shape[1], dtype).reshape(shape), codec, Layout(layout))
    assert c.plan[PLAN_HEAD + 2 * Section.BLOCK_CRC]
    blob = hostile(c, 3, small)
    for name, call in calls(c):
        results = []
        for fill, at in ((0, 64), (255, 67)):
            room, view = embedded(blob, fill, at)
            before = room.clone()
            results.append(call(view))
            assert torch.equal(room, before), name
        assert all(same(results[0], r) for r in results[1:]), name
        if codec == R8 and name == "decode":
            assert same(results[0], run("lossless_decode", blob, c.plan, 0, c.numel(), dtype, backend="reference"))
