"""`bgemm` and `bgemm_signs` on the CPU: every instruction set and engine, exactly equal to int64; epilogues; errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastloss
from bit_cases import BINARY, KINDS, PATHS, Rows, arguments, every_path, has_path, product, random_rows, rows_of
from fastloss import backend_cpp
from fastloss.compiled import _C, MISSING
from fastloss.quant import cpp_bgemm
from fastloss.quant.contract import Activation, row_bytes
from tolerance import check_close

pytestmark = pytest.mark.skipif(_C is None, reason=str(MISSING))

PLAIN = (None, None, None, Activation.NONE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(op: str, *args: object) -> Tensor | tuple[Tensor, Tensor]:
    with fastloss.use_backend("cpp"):
        return getattr(torch.ops.fastloss, op)(*args)


def integers(a: Rows, b: Rows) -> Tensor:
    found = cpp_bgemm.bgemm(*arguments(a, b), *PLAIN, torch.int32)  # not through the dispatcher: there are many
    assert found.dtype == torch.int32
    return found


def check(a: Rows, b: Rows, right: Tensor | None = None) -> None:
    right = product(a, b) if right is None else right
    for path in every_path():
        assert torch.equal(integers(a, b).long(), right), path


@pytest.fixture
def threads() -> Iterator[None]:
    """Undoes torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_path_of_this_machine_is_tested() -> None:
    found = list(every_path())
    assert found == [name for name in PATHS if has_path(name)] and {"scalar", "best"} <= set(found)
    assert (backend_cpp.ISA, cpp_bgemm.ENGINE) == (-1, -1)


def test_every_number_of_columns() -> None:
    kinds = list(KINDS.values())
    for k in range(1, 1101):
        a_kind, b_kind = (BINARY, BINARY) if k % 2 else (kinds[k % len(kinds)], kinds[k // 3 % len(kinds)])
        check(random_rows(1 + k * 7 % 37, k, a_kind), random_rows(1 + k * 5 % 41, k, b_kind))


def test_every_number_of_rows() -> None:
    kinds, columns = list(KINDS.values()), (1, 63, 64, 65, 100, 129, 511, 512, 513, 700, 1000)
    cases = []
    for i, k in enumerate(columns):
        a, b = random_rows(70, k, kinds[i]), random_rows(70, k, kinds[-1 - i])
        cases.append((a, b, product(a, b)))
    for m in range(1, 71):
        for n in range(1, 71):
            a, b, right = cases[(m * 71 + n * 3) % len(cases)]
            check(a.first(m), b.first(n), right[:m, :n])


@pytest.mark.parametrize("a_kind", KINDS)
def test_kinds(a_kind: str) -> None:
    for b_kind in KINDS:
        check(random_rows(35, 200, KINDS[a_kind]), random_rows(19, 200, KINDS[b_kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_all_ones_all_zeros_and_single_bits(kind: str) -> None:
    planes = len(KINDS[kind].weights)
    for k in (1, 64, 77, 512, 530):
        ones, zeros = torch.ones(planes, 33, k, dtype=torch.bool), torch.zeros(planes, 33, k, dtype=torch.bool)
        single = torch.zeros(planes, k, k, dtype=torch.bool)
        single[:, torch.arange(k), torch.arange(k)] = True
        rows = [rows_of(bits, KINDS[kind]) for bits in (ones, zeros, single)]
        for a, b in itertools.product(rows, rows):
            if a is not rows[2] or b is not rows[2] or k < 100:
                check(a, b)


def test_sums_beyond_24_bits() -> None:
    ones = torch.ones(1, 33, 100_000, dtype=torch.bool)
    a, b = rows_of(ones, KINDS["largest"]), rows_of(ones[:, :2], KINDS["smallest"])
    check(a, b)
    assert product(a, b).min() == -(127**2) * 100_000


@pytest.mark.parametrize("shape", [(300, 270, 4200), (257, 65, 8300), (33, 530, 1100), (20, 2100, 130)])
def test_more_than_one_block(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    check(random_rows(m, k, BINARY), random_rows(n, k, KINDS["odd levels"]))


def test_the_same_with_any_number_of_threads(threads: None) -> None:
    a, b = random_rows(310, 1000, KINDS["2 bits"]), random_rows(320, 1000, BINARY)
    vectors = (torch.randn(310), torch.randn(320), torch.randn(320))
    runs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        check(a, b)
        runs.append(run("bgemm", *arguments(a, b), *vectors, Activation.SILU, torch.float32))
    assert all(torch.equal(y, runs[0]) for y in runs)


def epilogue(right: Tensor, vectors: tuple[Tensor | None, ...], activation: int, dtype: torch.dtype) -> Tensor:
    """Each step in `dtype`."""
    row_scale, column_scale, bias = (None if v is None else v.to(dtype) for v in vectors)
    y = right.to(dtype)
    y = y if row_scale is None else y * row_scale[:, None]
    y = y if column_scale is None else y * column_scale
    y = y if bias is None else y + bias
    functions = (lambda y: y, torch.relu, torch.nn.functional.hardtanh, torch.nn.functional.silu)
    return functions[activation](y)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues(dtype: torch.dtype, activation: Activation) -> None:
    for n in (1, 16, 47, 64):
        a, b = random_rows(19, 300, BINARY), random_rows(n, 300, KINDS["ternary"])
        every = (torch.randn(19) * 0.1, torch.randn(n), torch.randn(n))
        for given in itertools.product((True, False), repeat=3):
            vectors = tuple(v if one else None for v, one in zip(every, given, strict=True))
            right = epilogue(product(a, b), vectors, activation, torch.float32).to(dtype)
            exact = epilogue(product(a, b), vectors, activation, torch.float64)
            for path in every_path():
                y = run("bgemm", *arguments(a, b), *vectors, activation, dtype)
                assert isinstance(y, Tensor) and y.dtype == dtype
                if activation == Activation.SILU:
                    check_close(y, right, exact, dtype)
                else:
                    assert torch.equal(y, right), path


@pytest.mark.parametrize("activation", list(Activation))
def test_signs(activation: Activation) -> None:
    for n in (1, 8, 31, 64, 300, 513):
        a, b = random_rows(21, 100, BINARY), random_rows(n, 100, BINARY)
        bias = torch.randn(n)
        bias[::3] = 0  # many results are 0: sign(0) = +1
        vectors = (torch.randn(21), torch.randn(n), bias)
        for given in (vectors, (None, None, None)):
            positive = epilogue(product(a, b), given, activation, torch.float32) >= 0
            for path in every_path():
                planes, popcounts = run("bgemm_signs", *arguments(a, b), *given, activation)
                assert torch.equal(planes, rows_of(positive[None], BINARY).planes), path
                assert torch.equal(popcounts, positive.sum(1, dtype=torch.int32)[None]), path


def test_special_numbers_in_the_epilogue() -> None:
    nan, inf = float("nan"), float("inf")
    a, b = random_rows(5, 64, BINARY), random_rows(20, 64, BINARY)
    special = torch.tensor([nan, inf, -inf, -0.0, 0.0, 1e-39, -1e-39, 1e-45, 3e38, 1.0] * 2)
    for activation in (Activation.NONE, Activation.RELU, Activation.HARDTANH):
        for dtype in DTYPES:
            vectors = (None, special * 0 if activation else None, special)
            right = epilogue(product(a, b), vectors, activation, torch.float32).to(dtype)
            for path in every_path():
                y = run("bgemm", *arguments(a, b), *vectors, activation, dtype)
                assert torch.equal(torch.nan_to_num(y, 123.0), torch.nan_to_num(right, 123.0)), path
        positive = epilogue(product(a, b), vectors, activation, torch.float32) >= 0
        for path in every_path():
            planes, _ = run("bgemm_signs", *arguments(a, b), *vectors, activation)
            assert torch.equal(planes, rows_of(positive[None], BINARY).planes), path


def test_silu_of_infinities() -> None:
    """As torch's: +inf stays, -inf times 0 is NaN; numbers that overflow on the way are infinities."""
    a, b = rows_of(torch.ones(1, 1, 64), BINARY), rows_of(torch.ones(1, 20, 64), BINARY)
    scale = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 2.0, 1.5, -1.3, -1.4, 1e-39] * 2)
    right = torch.nn.functional.silu(64 * scale)
    for path in every_path():
        y = run("bgemm", *arguments(a, b), None, scale, None, Activation.SILU, torch.float32)
        torch.testing.assert_close(y[0], right, rtol=1e-6, atol=0, equal_nan=True, msg=str(path))


def test_results_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_bgemm, "_STREAMED_BYTES", 0)
    for n in (64, 70, 320):
        a, b = random_rows(40, 200, BINARY), random_rows(n, 200, BINARY)
        for dtype in DTYPES:
            check(a, b)
            for path in every_path():
                y = run("bgemm", *arguments(a, b), *PLAIN, dtype)
                assert torch.equal(y, product(a, b).to(dtype)), path


@pytest.mark.parametrize("m, n", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_multiply(m: int, n: int) -> None:
    a, b = random_rows(m, 100, BINARY), random_rows(n, 100, BINARY)
    for _ in every_path():
        assert integers(a, b).shape == (m, n)
        planes, popcounts = run("bgemm_signs", *arguments(a, b), *PLAIN)
        assert planes.shape == (1, m, row_bytes(n)) and not planes.any() and not popcounts.any()


def test_no_columns() -> None:
    a, b = random_rows(3, 0, BINARY), random_rows(4, 0, BINARY)
    for _ in every_path():
        assert torch.equal(integers(a, b), torch.zeros(3, 4, dtype=torch.int32))


def test_strided_operands_and_untouched_arguments() -> None:
    a, b = random_rows(20, 600, KINDS["2 bits"]), random_rows(22, 600, BINARY)
    strided = Rows(a.planes[:, ::2], a.popcounts[:, ::2], a.values[::2], a.kind)
    before = [t.clone() for t in (a.planes, a.popcounts, b.planes, b.popcounts)]
    check(strided, b)
    assert all(torch.equal(x, y) for x, y in zip(before, (a.planes, a.popcounts, b.planes, b.popcounts), strict=True))


def test_what_the_kernel_does_not_take_runs_on_the_reference() -> None:
    a = random_rows(3, 140_000, KINDS["largest"])
    args = (*arguments(a, a), *PLAIN, torch.float32)
    assert "int32" in str(cpp_bgemm.why_not_product(*args)) and fastloss.registry.choose("bgemm", *args) == "reference"
    assert torch.equal(torch.ops.fastloss.bgemm(*args), product(a, a).double().float())
    wide = random_rows(3, 10, KINDS["binary"])._replace(kind=KINDS["binary"]._replace(weights=(300,)))
    assert "127" in str(cpp_bgemm.why_not_product(*arguments(wide, wide)))


def test_sums_beyond_int32_are_an_error_in_int32() -> None:
    rows = rows_of(torch.ones(1, 1, 140_000), BINARY)
    large = (*arguments(rows, rows)[:5], [127], 0, [127], 0)  # 140 000 times 127 squared
    with pytest.raises(ValueError, match="int32"):
        torch.ops.fastloss.bgemm(*large, *PLAIN, torch.int32)
    with pytest.raises(ValueError, match="int32"):
        torch.ops.fastloss.hamming_topk(*large, None, 1)
    assert torch.ops.fastloss.bgemm(*large, *PLAIN, torch.float32).item() == torch.tensor(140_000 * 127**2).float()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_errors_of_every_backend(backend: str) -> None:
    a, b = random_rows(3, 100, BINARY), random_rows(4, 100, BINARY)
    args = arguments(a, b)
    with fastloss.use_backend(backend):
        for epilogue, dtype in (((torch.ones(3), None, None, 0), torch.int32), ((None, None, None, 9), torch.float32)):
            with pytest.raises(ValueError, match="dtype int32 is the sum|activation must be"):
                torch.ops.fastloss.bgemm(*args, *epilogue, dtype)
    with fastloss.use_backend("reference"):
        for wrong in ((*args[:4], 600, *args[5:]), (*args[:5], [2, 3], *args[6:]), (*args[:5], [], *args[6:])):
            with pytest.raises(ValueError, match="planes of"):
                torch.ops.fastloss.bgemm(*wrong, *PLAIN, torch.float32)
        with pytest.raises(TypeError, match="int32 and floating"):
            torch.ops.fastloss.bgemm(*args, *PLAIN, torch.int64)


def test_errors() -> None:
    a, b = random_rows(3, 100, BINARY), random_rows(4, 100, BINARY)
    args = list(arguments(a, b))
    for position, wrong in ((0, a.planes[..., :32]), (1, a.popcounts[:, :2]), (2, b.planes.repeat(2, 1, 1)), (4, 600)):
        with pytest.raises(ValueError, match="columns must be planes"):
            run("bgemm", *args[:position], wrong, *args[position + 1 :], *PLAIN, torch.int32)
    with pytest.raises(TypeError, match="uint8"):
        run("bgemm", a.planes.int(), *args[1:], *PLAIN, torch.int32)
    for position, name in enumerate(("row_scale", "column_scale", "bias")):
        epilogue = [None, None, None]
        epilogue[position] = torch.ones(7)  # type: ignore[call-overload]
        with pytest.raises(ValueError, match=name):
            run("bgemm", *args, *epilogue, 0, torch.float32)
    for isa, engine in ((9, -1), (-2, -1), (-1, 9), (0, 1)):
        backend_cpp.ISA, cpp_bgemm.ENGINE = isa, engine
        try:
            with pytest.raises(ValueError, match="must be -1"):
                integers(a, b)
        finally:
            backend_cpp.ISA = cpp_bgemm.ENGINE = -1
