"""The lossless ops of the Triton backend, interpreted: bit for bit what was encoded, whatever the range.

The interpreter takes some 10 ms a step of R8, so streams are short here; one has whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastloss
import lossless_cases as cases
from fastloss import lossless
from fastloss.lossless.contract import Layout, Section
from triton_lossless_blobs import P7, R8, decoded, packed, run, same, sparse

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


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
