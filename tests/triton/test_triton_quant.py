"""The bit ops of the Triton backend, interpreted, against the reference: bits, codes and roundings exactly, sums closely.

The interpreter rounds halves up when it makes bfloat16 and multiplies bit patterns of it: bfloat16 results are for a GPU.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from fastloss.triton_kernels import (
    binarize_surrogates,
    bit_tiles,
    lowbit_matmul,
    lowbit_matmul_kernels,
    quantize_groups,
)
from fastloss.triton_kernels.linear_row_stats import Tile

import fastloss
import quant_cases
from fastloss.quant import reference_bits, reference_quant
from fastloss.quant.contract import Surrogate
from fastloss.quant.surrogates import BY_NAME

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinities
OPS = torch.ops.fastloss


#: Every such case is interpreted, which takes its time; all of them run on a GPU.
EVERY = {"pack_bits": 3, "binarize": 3, "binarize_backward": 4, "lowbit_matmul": 5}


@pytest.mark.parametrize("name", quant_cases.CASES)
def test_as_the_reference(name: str) -> None:
    for op, args in list(quant_cases.CASES[name](torch.float32))[:: EVERY.get(name, 1)]:
        quant_cases.check("triton", op, args)


@pytest.mark.parametrize("name", ["pack_bits", "fake_quant", "groups", "lowbit_matmul"])
def test_float16(name: str) -> None:
    for op, args in list(quant_cases.CASES[name](torch.float16))[3::7]:
        quant_cases.check("triton", op, args)


def test_bfloat16_is_read_exactly() -> None:
    for op, args in list(quant_cases.CASES["pack_bits"](torch.bfloat16))[::5]:
        quant_cases.check("triton", op, args)


def test_int8_rows() -> None:
    for op, args in list(quant_cases.lowbit_cases(torch.int8, (20,)))[::2]:
        quant_cases.check("triton", op, args)


def test_splits_tiles_and_the_copy_engine() -> None:
    """Sums of several programs, several tiles, groups of more than a block of columns, and x read by a descriptor."""
    planes = quant_cases.packed(40, 600, "ternary")
    x, scale = torch.randn(20, 600).half(), torch.rand(40, 4) + 0.1
    tile = Tile(16, 32, 64, 4, 2)
    for group, by, splits, tma in ((0, scale[:, :1], 3, False), (192, scale, 3, False), (192, scale, 1, True)):
        args = (planes, 600, [-1, 2], 0, by, group, False, None, None, torch.float32)
        wanted = quant_cases.run("reference", "lowbit_matmul", (x, *args))[0]
        got = lowbit_matmul.lowbit_matmul(x, *args, tile=tile, splits=splits, tma=tma)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_float32_rows_lose_nothing() -> None:
    """All 24 bits of a number reach the product, infinities and NaN too; one number a row leaves nothing to sum."""
    x = torch.tensor(
        [[1 + 2**-23, 3.0e38, -1e-30], [float("inf"), 1.0, 0.0], [float("nan"), 0.0, 0.0], [3.0, -7.0, 2.0]]
    )
    with fastloss.use_backend("reference"):
        planes = OPS.pack_bits(torch.diag(torch.tensor([2.0, -2.0, -2.0])), 1, None, None, 0, 0, 2)[0]
    args = (planes, 3, [-1, 2], 0, None, 0, False, None, None, torch.float32)
    with fastloss.use_backend("triton"):
        y = OPS.lowbit_matmul(x[[0, 3]], *args)
        assert torch.equal(y, x[[0, 3]] * torch.tensor([1.0, -1.0, -1.0]))
        y = OPS.lowbit_matmul(x[1:3], *args)
    assert y[0, 0] == float("inf") and y[1].isnan().all()


@triton.jit
def _slopes(u, out, p0, p1, waves, SURROGATE: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)[None, :]
    tl.store(out + at, binarize_surrogates.slope(tl.load(u + at), p0, p1, waves, SURROGATE))


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_binarize_surrogates_alone(name: str) -> None:
    """Every slope, at and beside its kinks and far from them, in fp32 against the reference's in fp64."""
    kind, p0, p1 = BY_NAME[name]()
    assert getattr(binarize_surrogates, kind.name).value == kind and len(Surrogate) == 7
    beside = [
        0.0,
        -0.0,
        0.0999,
        0.1001,
        1.0,
        -1.0,
        1.4999,
        1.5001,
        30.0,
        -30.0,
        1e9,
        1e-9,
        0.5,
    ]  # of fp32 0.1 is no number
    u = torch.cat((torch.linspace(-2, 2, 115), torch.tensor(beside)))
    got = torch.full_like(u, float("nan"))
    _slopes[(1,)](u, got, p0, p1, int(p1) + 1, int(kind), u.numel())
    want = reference_quant.slope(u.double(), int(kind), p0, p1)
    assert want.abs().max() > 0
    near = u.abs() < 1e6 if kind in (Surrogate.BIPER, Surrogate.FDA) else torch.ones_like(u, dtype=torch.bool)
    torch.testing.assert_close(got[near].double(), want[near], rtol=2e-5, atol=2e-4)


@triton.jit
def _weight_tile(words, out, rows, row_words, column, WEIGHTS: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    r = tl.arange(0, ROWS)
    tile = lowbit_matmul_kernels.weight_tile(
        words, tl.minimum(r, rows - 1), column, rows, row_words, WEIGHTS, OFFSET, ROWS, COLUMNS, tl.float32
    )
    tl.store(out + r[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], tile)


@pytest.mark.parametrize("name", sorted(quant_cases.KINDS))
def test_lowbit_matmul_kernels_read_weights(name: str) -> None:
    """The integers that planes of bits stand for, from any word on."""
    planes, weights, offset = quant_cases.packed(5, 700, name), quant_cases.KINDS[name][3], quant_cases.KINDS[name][4]
    want = reference_bits.values(planes, 700, weights, offset)
    words = planes.contiguous().view(torch.int32)
    for column in (0, 64, 608):
        got = torch.full((8, 64), float("nan"))
        _weight_tile[(1,)](words, got, 5, words.shape[-1], column, tuple(weights), offset, 8, 64)
        assert torch.equal(got[:5].double(), want[:, column : column + 64].double())
        assert torch.equal(got[5:], got[4].expand(3, -1))


def test_a_walk_covers_the_matrix() -> None:
    for rows, columns, down in ((1, 5000, False), (5000, 3, True), (3, 70, True), (70, 600, False), (100_000, 9, True)):
        w = bit_tiles.walk(rows, columns, down)
        along, across = (rows, columns) if down else (columns, rows)
        tile_along, tile_across = (w.rows, w.columns) if down else (w.columns, w.rows)
        assert w.across * tile_across >= across and w.splits * w.steps * tile_along >= along
        assert (w.splits * w.steps - w.steps) * tile_along < along  # no program without work


def test_codes_are_made_of_a_range_that_took_several_programs() -> None:
    x = torch.randn(12_000)
    x[7_000] = float("nan")
    codes = quantize_groups.quantize_groups(x, 6_000, 8, None, None, None)
    for a, b in zip(
        codes, quant_cases.run("reference", "quantize_groups", (x, 6_000, 8, None, None, None)), strict=True
    ):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_what_is_not_taken_is_said() -> None:
    x = torch.randn(3, 10)
    for op, args, word in (
        ("pack_bits", (x.double(), 0), "float64"),
        ("fake_quant", (x.double(), torch.ones(1), None, None, 1, 1, 0.0, 1.0, 1.0, 0.0, False), "float64"),
        ("quantize_groups", (x.flatten().double(), 8, 4), "float64"),
    ):
        with fastloss.use_backend("triton"), pytest.raises(fastloss.BackendError, match=word):
            getattr(OPS, op)(*args)
