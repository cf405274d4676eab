"""The CUDA kernels of the lossless codecs on the host, in several thread orders: every byte as the reference's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lossless_blobs
from cuda_host import build
from cuda_host.lossless import Case, save
from fastloss.lossless import reference_p7, reference_r8
from fastloss.lossless.contract import NUMBERS, PLAN_HEAD, Layout, Section, pair_table
from lossless_calls import (
    PAIRED,
    checksums,
    decoded,
    flat,
    gathered,
    hostile,
    p7_encoders,
    r8_encoders,
    ranges,
    small_cases,
)  # fmt: skip
from lossless_cases import CODED, bits, constant, every_pattern, mostly_normal, normal, uniform_bits

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")
ORDERS = ("asc", "desc", "7")
Maker = Callable[[int, torch.dtype], Tensor]
#: Around eight numbers, a group, a block; and what makes escapes, or every bit pattern.
SIZES: tuple[tuple[int, Maker], ...] = (
    (1, normal), (2, uniform_bits), (63, mostly_normal), (65, normal), (127, uniform_bits), (128, mostly_normal),
    (129, normal), (4000, constant), (16383, mostly_normal), (16384, uniform_bits), (16385, mostly_normal), (33001, normal),
)  # fmt: skip


@pytest.fixture(params=ORDERS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain build, with threads in one of three orders."""
    monkeypatch.setenv("EMU_ORDER", request.param)
    return build.build(only="lossless")


@functools.cache
def p7_cases(dtype: torch.dtype) -> list[Case]:
    return [case for count, make in SIZES for case in ranges(lossless_blobs.p7(make(count, dtype)))]


@functools.cache
def r8_cases(dtype: torch.dtype) -> list[Case]:
    """With byte planes coded, or raw, or some of each."""
    coded = ((), (0,), (0, 1, 2), (1,), (2, 0))
    made = (lossless_blobs.r8(make(count, dtype), coded=coded[i % 5]) for i, (count, make) in enumerate(SIZES))
    return [case for blob in made for case in ranges(blob)]


@pytest.mark.parametrize("dtype", PAIRED, ids=str)
def test_p7_decode(dtype: torch.dtype, library: Path) -> None:
    for case in p7_cases(dtype):
        case.run(library)


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_r8_decode(dtype: torch.dtype, library: Path) -> None:
    for case in r8_cases(dtype):
        case.run(library)


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_every_pattern(dtype: torch.dtype) -> None:
    x = every_pattern(dtype) if dtype.itemsize < 4 else every_pattern(torch.bfloat16).float()
    decoded(lossless_blobs.r8(x, coded=(0,))).run(build.build(only="lossless"))
    if dtype in PAIRED:
        decoded(lossless_blobs.p7(x)).run(build.build(only="lossless"))


def test_absent_planes(library: Path) -> None:
    """Numbers that are bf16 in fact: two planes are not there. And numbers without any byte plane."""
    x = mostly_normal(5000, torch.bfloat16).float()
    for made in (lossless_blobs.p7(x), lossless_blobs.p7(torch.ones(300, dtype=torch.bfloat16))):
        assert made.plan[PLAN_HEAD + 2 * Section.BYTES0] == 0
        decoded(made).run(library)


@pytest.mark.parametrize("dtype", PAIRED, ids=str)
def test_tiles(dtype: torch.dtype, library: Path) -> None:
    for rows, columns in ((16, 128), (48, 384), (32, 1024)):
        made = lossless_blobs.p7(mostly_normal(rows * columns, dtype), columns, Layout.TILES)
        decoded(made).run(library)
        if rows > 16:
            decoded(made, 16 * columns, 16 * columns).run(library)


@functools.cache
def row_cases(dtype: torch.dtype) -> list[Case]:
    """Rows of any length, across blocks and longer than one; ids twice and out of bounds, of both widths."""
    cases = []
    for rows, columns in ((40, 130), (9, 17), (7, 5000), (2, 17000), (300, 1)):
        index = torch.tensor([1, 0, rows - 1, 1, -1, rows, 2**31 - 1, -(2**31)])
        x = mostly_normal(rows * columns, dtype)
        for made in (
            lossless_blobs.r8(x, columns, (0,)),
            *([lossless_blobs.p7(x, columns)] if dtype in PAIRED else []),
        ):
            cases += [gathered(made, i) for i in (index, index.to(torch.int32), torch.tensor([2**40, 0, -(2**40)]))]
    return cases


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_rows(dtype: torch.dtype, library: Path) -> None:
    for case in row_cases(dtype):
        case.run(library)


def test_crc32c(library: Path) -> None:
    for case in checksums():
        case.run(library)


@functools.cache
def encoder_cases(dtype: torch.dtype) -> list[Case]:
    """Every second size: a histogram of pairs is 512 KB."""
    made = [make(count, dtype) for count, make in SIZES[::2] + SIZES[-2:]]
    return [case for x in made for case in [*r8_encoders(x), *(p7_encoders(x) if dtype in PAIRED else [])]]


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_encoders(dtype: torch.dtype, library: Path) -> None:
    for case in encoder_cases(dtype):
        case.run(library)


def test_table_with_equal_entries(library: Path) -> None:
    """Of equal entries of a table the first counts, whatever the order of threads; +0, +0 is among the unused."""
    x = mostly_normal(3000, torch.bfloat16)
    x[100:200] = 0
    table = torch.from_numpy(pair_table(reference_p7.p7_histogram(x).numpy()))
    table[[5, 133, 9, 137]] = table[[3, 131, 3, 131]]
    codes, planes, section, *escapes = reference_p7.p7_encode(x, table)
    want = flat(codes, *planes, section, *escapes)
    Case("p7_encode", [bits(x).numpy(), int(NUMBERS[x.dtype]), 2, table.numpy()], want).run(library)


def test_frequencies_of_a_foreign_encoder(library: Path) -> None:
    """No symbol has slots: all are literals. One symbol has all but one."""
    plane = reference_r8.byte_split(normal(3000, torch.bfloat16))[0][0]
    none = torch.zeros(256, dtype=torch.uint8)
    for table in (none, none.index_fill(0, plane[:1].long(), 255)):
        want = flat(*reference_r8.r8_encode(plane, table, 3000))
        Case("r8_encode", [plane.numpy(), table.numpy(), 3000], want).run(library)


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitized(variant: str, tmp_path: Path) -> None:
    """Out of bounds, of hostile blobs too, and races."""
    save(tmp_path / "cases.npz", small_cases() + (hostile() if variant == "asan" else []))
    library = build.build(variant, only="lossless")
    code, output = build.run_sanitized(variant, library, str(tmp_path / "cases.npz"), module="lossless")
    assert code == 0, output


def test_hostile_blobs_decode_as_by_the_reference() -> None:
    """R8 of streams of random bytes: clamped in the same way everywhere, so that a wrong number is the same wrong number."""
    x = mostly_normal(16384 + 300, torch.bfloat16)
    made = lossless_blobs.r8(x)
    for kind in (Section.FIELD_DATA, Section.FIELD_OFFSETS, Section.FIELD_FREQUENCIES):
        at, count = made.plan[PLAN_HEAD + 2 * kind : PLAN_HEAD + 2 * kind + 2]
        bad = made.blob.clone()
        bad[at : at + count] = uniform_bits(count, torch.uint8, int(kind))
        f, offsets, data = (
            bad[made.plan[PLAN_HEAD + 2 * k] :][: made.plan[PLAN_HEAD + 2 * k + 1]] for k in (9, 10, 11)
        )
        field = reference_r8.r8_decode(f, offsets.clone().view(torch.int64), data, x.numel(), 0, 2)
        plane = reference_r8.byte_split(x)[0][1].to(torch.int64)
        word = field.to(torch.int64) << 7 | (plane & 127) | plane >> 7 << 15
        want = word[: x.numel()].numpy().astype(np.uint16).view(np.uint8)
        Case("decode", [bad.numpy(), made.plan, 0, x.numel(), 2], want).run(build.build(only="lossless"))
