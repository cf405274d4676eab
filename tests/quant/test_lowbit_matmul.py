"""`lowbit_matmul` on the CPU: every engine, orientation, dtype, kind of number and group against float64; integers exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import backend_cpp
from fastloss.compiled import _C, MISSING
from fastloss.quant import contract, ops, reference_bits  # noqa: F401  (ops registers what torch.ops.fastloss holds)
from tolerance import check_close

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))

LEVELS = ("scalar", "avx2", "avx512", "avx512bf16", "amx")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: weights, offset: binary, ternary, codes of 2 bits, unsigned, odd levels and codes of 4 bits, the largest numbers.
KINDS = {
    "binary": ((2,), -1), "ternary": ((-1, 2), 0), "codes2": ((1, 2), -2), "codes3": ((1, 2, 4), 0),
    "levels4": ((2, 4, 8, 16), -15), "codes4": ((1, 2, 4, 8), -8), "largest": ((127, 127), -127),
}  # fmt: skip
EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130, 511, 512, 513, 1030)


def has_amx() -> bool:
    try:
        run_at(4, torch.ones(1, 1), torch.zeros(1, 1, 64, dtype=torch.uint8), 1, (2,), -1)
    except (ValueError, TypeError):
        return False
    return True


def run_at(isa: int, *args: object, **rest: object) -> Tensor:
    before, backend_cpp.ISA = backend_cpp.ISA, isa
    try:
        with fastloss.use_backend("cpp"):
            return product(*args, **rest)  # type: ignore[arg-type]
    finally:
        backend_cpp.ISA = before


def product(
    x: Tensor, planes: Tensor, columns: int, weights: Sequence[int], offset: int, scale: Tensor | None = None,
    group: int = 0, transposed: bool = False, x_scale: Tensor | None = None, bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    return torch.ops.fastloss.lowbit_matmul(
        x, planes, columns, list(weights), offset, scale, group, transposed, x_scale, bias, dtype
    )


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def isa(request: pytest.FixtureRequest) -> int:
    """Each engine in turn, forced."""
    if request.param > _C.best_isa() and not (request.param == 4 and has_amx()):
        pytest.skip(f"needs {LEVELS[request.param]}")
    return request.param


def planes_of(rows: int, columns: int, count: int) -> Tensor:
    return reference_bits.pack(torch.rand(count, rows, columns) < 0.5)


def numbers(planes: Tensor, columns: int, kind: str, scale: Tensor | None = None, group: int = 0) -> Tensor:
    w = reference_bits.values(planes, columns, *KINDS[kind])
    return w if scale is None else w * reference_bits.by_group(scale.double(), group, columns)


def check(
    isa: int, m: int, n: int, k: int, kind: str, dtype: torch.dtype = torch.float32, group: int = 0, transposed: bool = False,
    scaled: str = "row", bias: bool = False, out: torch.dtype | None = None,
) -> None:  # fmt: skip
    """n, k: rows and columns of the bits."""
    out = out or dtype
    weights, offset = KINDS[kind]
    planes = planes_of(n, k, len(weights))
    x = torch.randn(m, n if transposed else k).to(dtype)
    groups = math.ceil(k / group) if group else 1
    scale = None if scaled == "none" else torch.rand(1 if scaled == "one" else n, groups) + 0.5
    b = torch.randn(n) if bias else None
    ours = run_at(isa, x, planes, k, weights, offset, scale, group, transposed, None, b, out)
    w = numbers(planes, k, kind, scale, group)
    right = x.double() @ (w if transposed else w.T)
    torchs = x.float() @ (w.float() if transposed else w.float().T)
    if b is not None:
        right, torchs = right + b, torchs + b
    assert ours.dtype == out and ours.shape == right.shape
    results = (ours, torchs.to(out), right)
    if right.shape[1] == 1:  # one number that cancels says nothing of the scale of its row
        results = (ours.T, torchs.to(out).T, right.T)
    check_close(*results, out)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(isa: int, kind: str, dtype: torch.dtype, transposed: bool) -> None:
    for m in (3, 37):
        check(isa, m, 50, 200, kind, dtype, transposed=transposed, out=torch.float32 if m == 3 else None)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_edge(isa: int, dtype: torch.dtype, transposed: bool) -> None:
    for index, edge in enumerate(EDGES):
        kind = list(KINDS)[index % len(KINDS)]
        check(isa, 33, 5, edge, kind, dtype, transposed=transposed, scaled="none")
        check(isa, 9, edge, 40, kind, dtype, transposed=transposed)
        check(isa, 2, edge, 70, kind, dtype, transposed=transposed)
        check(isa, min(edge, 130), 34, 66, kind, dtype, transposed=transposed)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9])
def test_few_rows(isa: int, rows: int) -> None:
    for kind in ("binary", "codes3", "levels4"):
        check(isa, rows, 35, 600, kind, bias=True)
        check(isa, rows, 35, 600, kind, transposed=True)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("group", [64, 128, 192, 576, 1024])
@pytest.mark.parametrize("scaled", ["row", "one"])
def test_groups(isa: int, group: int, transposed: bool, scaled: str) -> None:
    for m, dtype in ((2, torch.float16), (35, torch.bfloat16), (35, torch.float32)):
        check(isa, m, 37, 1100, "codes4", dtype, group, transposed, scaled, bias=not transposed)


@pytest.mark.parametrize("rows", [1, 3, 8, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_rows_are_exact(isa: int, kind: str, rows: int) -> None:
    """Sums beyond 2^24, which no float holds, scaled by powers of two; rows of the largest numbers too."""
    weights, offset = KINDS[kind]
    for n, k in ((37, 70), (5, 1100), (33, 2500)):
        planes = planes_of(n, k, len(weights))
        planes[:, 0] = reference_bits.pack(torch.ones(k) > 0)
        x = torch.randint(-128, 128, (rows, k), dtype=torch.int8)
        x[0] = -128
        exact = x.double() @ numbers(planes, k, kind).T
        ours = run_at(isa, x, planes, k, weights, offset, torch.full((1, 1), 0.25), 0, False, torch.full((rows,), 2.0))
        assert torch.equal(ours, exact.float() * 0.5)


@pytest.mark.parametrize("group", [64, 192, 576])
def test_int8_rows_by_group(isa: int, group: int) -> None:
    """((acc x_scale) scale) of each group in float32, added in their order: the contract, bit for bit."""
    for rows in (2, 40):
        n, k, (weights, offset) = 37, 1100, KINDS["codes4"]
        planes, x = planes_of(n, k, 4), torch.randint(-128, 128, (rows, k), dtype=torch.int8)
        scale, x_scale, bias = torch.rand(n, math.ceil(k / group)), torch.rand(rows), torch.randn(n)
        w, right = numbers(planes, k, "codes4"), torch.zeros(rows, n)
        for g in range(scale.shape[1]):
            columns = slice(g * group, (g + 1) * group)
            acc = (x[:, columns].double() @ w[:, columns].T).float()
            right = right + acc * x_scale[:, None] * scale[:, g]
        ours = run_at(isa, x, planes, k, weights, offset, scale, group, False, x_scale, bias)
        assert torch.equal(ours, right + bias)


def test_blocks_of_many_rows(isa: int) -> None:
    """More rows than a block, more outputs than a thread takes at a time, more columns than a chunk."""
    if isa < 2:
        check(isa, 130, 20, 600, "ternary")
        return
    for transposed in (False, True):
        check(isa, 600, 300, 600, "ternary", torch.bfloat16, transposed=transposed)
        check(isa, 300, 300, 600, "codes4", torch.float32, transposed=transposed)


def test_all_of_a_float32_counts(isa: int) -> None:
    """A product that is exact in float32 is exact here: nothing of x is rounded away."""
    x = (torch.randint(-(2**23), 2**23, (40, 1)) * 2 + 1).float().mul_(2.0**-20)
    planes = planes_of(50, 1, 1)
    for transposed in (False, True):
        p, k = (planes, 1) if not transposed else (planes_of(1, 50, 1), 50)
        right = x * (numbers(p, k, "binary") if transposed else numbers(p, k, "binary").T)
        assert torch.equal(run_at(isa, x, p, k, (2,), -1, None, 0, transposed).double(), right)


def test_long_sums(isa: int) -> None:
    """16384 columns: the error is no larger than torch's, with some room for chance."""
    k = 16384
    planes, x = planes_of(34, k, 4), torch.randn(33, k)
    w = numbers(planes, k, "codes4")
    right = x.double() @ w.T
    ours = run_at(isa, x, planes, k, *KINDS["codes4"])
    assert (ours - right).norm() <= 1.1 * (x @ w.float().T - right).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_rows_keep_their_digits(isa: int, dtype: torch.dtype) -> None:
    """Also where a unit that multiplies bf16 would take them, or their lower parts, as 0."""
    planes = planes_of(34, 600, 2)
    w = numbers(planes, 600, "codes2")
    for power in (-98, -105, -112, -120, -127):
        x = torch.randn(40, 600)
        x[::3] *= 2.0**power
        x[7] = 0
        x = x.to(dtype)
        right = x.double() @ w.T
        error = (run_at(isa, x, planes, 600, *KINDS["codes2"]) - right).norm(dim=1)
        assert (error <= 5e-7 * right.norm(dim=1)).all(), power
        tiny = torch.full((40, 34), 2.0**-60).to(dtype)  # by a scale that makes the rows as small
        scale = torch.full((34, 1), 2.0 ** (power + 60))
        right = tiny.double() @ (w * scale.double())
        error = run_at(isa, tiny, planes, 600, *KINDS["codes2"], scale, 0, True) - right
        assert error.norm() <= 5e-7 * right.norm(), power


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bias_and_scale_of_16_bits(dtype: torch.dtype) -> None:
    """As a layer has them after `.half()`: the kernel takes them."""
    planes, x = planes_of(30, 200, 2), torch.randn(20, 200).to(dtype)
    scale, bias = torch.rand(30, 1).to(dtype), torch.randn(30).to(dtype)
    wide = run_at(-1, x, planes, 200, *KINDS["codes2"], scale.float(), bias=bias.float())
    assert torch.equal(run_at(-1, x, planes, 200, *KINDS["codes2"], scale, bias=bias), wide)


@pytest.mark.parametrize("rows", [2, 40])
def test_infinities_and_nan(isa: int, rows: int) -> None:
    """Row by row they come out as in torch's own product."""
    k, n = 600, 20
    planes = planes_of(n, k, 1)
    for dtype in DTYPES:
        x = torch.randn(rows, k).to(dtype)
        x[0, 3], x[1, 599] = math.inf, math.nan
        w = numbers(planes, k, "binary").float()
        for transposed in (False, True):
            if transposed:
                x, w = x[:, :n].contiguous(), w
                x[1, 2] = math.nan
            right = x.float() @ (w if transposed else w.T)
            ours = run_at(isa, x, planes, k, (2,), -1, None, 0, transposed)
            assert torch.equal(ours[0], right[0]) and ours[1].isnan().all()
            torch.testing.assert_close(ours[2:], right[2:], rtol=1e-4, atol=1e-4)
    largest = torch.full((rows, 1), torch.finfo(torch.float32).max)
    ours = run_at(isa, largest, planes_of(4, 1, 1), 1, (2,), -1)
    assert torch.equal(ours.abs(), largest.expand(rows, 4))


def test_strides_and_empty(isa: int) -> None:
    planes = planes_of(20, 100, 2)
    x = torch.randn(40, 200)
    right = run_at(isa, x[:, :100].contiguous(), planes, 100, (-1, 2), 0)
    assert torch.equal(run_at(isa, x[:, :100], planes, 100, (-1, 2), 0), right)
    assert torch.equal(run_at(isa, x[:, :100].T.contiguous().T, planes, 100, (-1, 2), 0), right)
    assert run_at(isa, x[:0, :100], planes, 100, (-1, 2), 0).shape == (0, 20)
    assert run_at(isa, x[:, :100], planes[:, :0], 100, (-1, 2), 0).shape == (40, 0)
    assert torch.equal(run_at(isa, x[:, :0], planes[:, :0], 100, (-1, 2), 0, None, 0, True), torch.zeros(40, 100))


def test_threads_change_nothing(isa: int) -> None:
    before = torch.get_num_threads()
    planes, scale = planes_of(300, 1100, 3), torch.rand(300, 5)
    try:
        for rows in (2, 70):
            for transposed in (False, True):
                x, found = torch.randn(rows, 300 if transposed else 1100), []
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    found.append(run_at(isa, x, planes, 1100, (1, 2, 4), -4, scale, 256, transposed))
                assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)


def test_what_it_does_not_take() -> None:
    planes = planes_of(20, 100, 1)
    x = torch.randn(4, 100)
    assert "takes numbers in [-127, 127]" in fastloss.explain(
        "lowbit_matmul", x, planes, 100, [256], -128, None, 0, False, None, None, torch.float32
    )
    double = product(x.double(), planes, 100, (2,), -1, dtype=torch.float64)  # the reference
    torch.testing.assert_close(double, x.double() @ numbers(planes, 100, "binary").T)
    for bad in (
        (x[:, :99], planes, 100, (2,), -1),
        (x, planes[:, :, :32], 100, (2,), -1),
        (x, planes, 100, (2,), -1, torch.ones(19, 1)),
        (x, planes, 100, (2,), -1, None, 32),
        (x, planes, 100, (1, 2), -1),
        (x, planes, 100, (2,), -1, None, 0, False, None, torch.ones(19)),
    ):
        with pytest.raises(ValueError):
            run_at(-1, *bad)
    with pytest.raises(ValueError, match="isa must be"):
        run_at(9, x, planes, 100, (2,), -1)
