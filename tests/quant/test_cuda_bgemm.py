"""bgemm.cu and hamming_topk.cu on the host, in several thread orders: whole numbers equal to int64's, floats bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cuda_host import build
from cuda_host.bits import HARDTANH, KINDS, NONE, RELU, SILU, Case, TopkCase, run, run_any, run_topk, small_cases
from cuda_host.rows import int64

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")
ORDERS = ("asc", "desc", "7")
ENGINES = pytest.mark.parametrize("int8", [False, True], ids=["bits", "int8"])
#: Around the steps of ldmatrix, of a tensor core, of the pipeline, and everything below 40.
WIDTHS = [*range(1, 40), *(k + d for k in (64, 128, 256, 512, 1024) for d in (-1, 0, 1)), 640, 777, 1099, 1100]


@pytest.fixture(params=ORDERS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain build, with threads in one of three orders."""
    monkeypatch.setenv("EMU_ORDER", request.param)
    return build.build(only="bits")


def shapes(seed: int) -> Iterator[tuple[int, int]]:
    """M and N of 1 to 70, the ends first."""
    yield from ((1, 1), (70, 1), (1, 70), (64, 65), (70, 70))
    rng = np.random.default_rng(seed)
    while True:
        m, n = rng.integers(1, 71, 2)
        yield int(m), int(n)


@pytest.mark.parametrize("order", range(3), ids=ORDERS)
def test_widths(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMU_ORDER", ORDERS[order])
    random = np.random.default_rng(0).integers(40, 1101, 60)
    for k, (m, n) in zip([*WIDTHS, *map(int, random)][order::3], shapes(order), strict=False):
        run(build.build(only="bits"), Case(m, n, k))


def test_widths_int8(library: Path) -> None:
    for k, (m, n) in zip((1, 31, 65, 128, 511, 513, 1100), shapes(1), strict=False):
        run(library, Case(m, n, k, int8=True))


@ENGINES
@pytest.mark.parametrize("a", list(KINDS))
def test_kinds(a: str, int8: bool) -> None:
    """Every kind with every kind: Horner's rule whatever the weights."""
    for b in KINDS:
        if not int8 or (len(KINDS[a][0]) + len(KINDS[b][0])) % 2:
            run(build.build(only="bits"), Case(9, 12, 140, a, b, int8=int8))


@ENGINES
@pytest.mark.parametrize("fill", ["ones", "zeros", "single"])
def test_extreme_bits(fill: str, int8: bool) -> None:
    for k, (a, b) in itertools.product((65, 512), (("binary", "binary"), ("ternary", "odd4"))):
        run(build.build(only="bits"), Case(17, 9, k, a, b, fill=fill, int8=int8))


@pytest.mark.parametrize("output", ["fp32", "fp16", "bf16", "signs"])
def test_epilogues(library: Path, output: str) -> None:
    """Scales, bias (one of them NaN) and activation, rounded at each step; odd and even rows of the result."""
    epilogues = ("", "r", "c", "b", "rc", "rcb")
    activations = (NONE, RELU, HARDTANH) if output == "signs" else (NONE, RELU, HARDTANH, SILU)
    for (epilogue, activation), n in zip(
        itertools.product(epilogues, activations), itertools.cycle((33, 36, 1)), strict=False
    ):
        run(library, Case(5, n, 77, "ternary", "codes2", output, epilogue, activation))


def test_signs_of_many_columns(library: Path) -> None:
    """Rows padded with zeros to 512 bits, by tiles that have no column."""
    for m, n, tile in ((3, 511, 0), (2, 513, 0), (66, 600, 1)):
        run(library, Case(m, n, 40, output="signs", epilogue="c", tile=tile))


@ENGINES
def test_several_tiles(int8: bool) -> None:
    """Groups of 8 rows of tiles, the last one not full; all sizes of tiles."""
    run(build.build(only="bits"), Case(64 * 9 + 1, 70, 33, int8=int8))
    run(build.build(only="bits"), Case(130, 257, 600, "ternary", output="int32", int8=int8, tile=1))
    run(build.build(only="bits"), Case(257, 130, 600, output="bf16", epilogue="c", int8=int8, tile=2))


@pytest.mark.parametrize("scale", ["", "random", "hard"])
def test_topk(library: Path, scale: str) -> None:
    for m, n, k, count, splits in ((1, 1, 1, 1, 1), (5, 70, 33, 70, 2), (3, 300, 64, 33, 3), (40, 260, 9, 5, 5)):
        run_topk(library, TopkCase(m, n, k, count, splits, scale=scale))


@ENGINES
def test_topk_kinds(int8: bool) -> None:
    for a, b in (("ternary", "ternary"), ("codes3", "binary"), ("binary", "any")):
        run_topk(build.build(only="bits"), TopkCase(9, 100, 70, 10, 2, a, b, int8=int8))


def test_topk_of_many_parts(library: Path) -> None:
    """More lists than a block that merges them has warps, some of them empty; more rows than a block has."""
    run_topk(library, TopkCase(3, 1300, 40, 40, 25))
    run_topk(library, TopkCase(131, 130, 20, 3, 1))


def test_plan() -> None:
    """Large tiles where they fill the device, bits up to sm_90, and parts of b only where rows of a are few."""
    library = build.load(build.build(only="bits"))
    for (m, n, capability, kib), plan in {
        (4096, 4096, 90, 227): 2, (4096, 4096, 89, 99): 1, (8192, 64, 90, 227): 0, (1, 8192, 80, 163): 0,
        (1000, 1000, 89, 99): 0, (2048, 2048, 90, 227): 1, (4096, 4096, 100, 227): 6, (1, 1, 120, 99): 4,
    }.items():  # fmt: skip
        assert library.c_bgemm_plan(int64(m), int64(n), 132, capability, kib << 10) == plan
    for (m, n), splits in {(1024, 1 << 20): 66, (1, 1 << 20): 528, (100000, 1 << 20): 1, (1, 500): 1}.items():
        assert library.c_topk_splits(int64(m), int64(n), 132) == splits


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitized(variant: str) -> None:
    """Out of bounds and races."""
    code, output = build.run_sanitized(variant, build.build(variant, only="bits"), module="bits")
    assert code == 0, output


@pytest.mark.parametrize("number", range(len(small_cases())))
def test_small_cases(library: Path, number: int) -> None:
    run_any(library, small_cases()[number])
