"""`hamming_topk` against sorting all products: every path of the CPU, ties, scales, threads; the public function."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastloss
from bit_cases import BINARY, KINDS, Rows, arguments, every_path, product, random_rows, rows_of
from fastloss.compiled import _C, MISSING
from fastloss.quant import BitTensor, cpp_bgemm, hamming_topk, pack_bits, pack_codes, unpack_bits

compiled = pytest.mark.skipif(_C is None, reason=str(MISSING))


def run(a: Rows, b: Rows, scale: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    return cpp_bgemm.hamming_topk(*arguments(a, b), scale, count)


def sorted_all(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Falling, the lowest index first among equals."""
    values, index = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], index[:, :count]


def check(a: Rows, b: Rows, count: int) -> None:
    values, index = sorted_all(product(a, b), count)
    for path in every_path():
        found, at = run(a, b, None, count)
        assert found.dtype == torch.int32 and at.dtype == torch.int64
        assert torch.equal(at, index) and torch.equal(found.long(), values), path


def check_scaled(a: Rows, b: Rows, scale: Tensor, count: int) -> None:
    values, index = sorted_all(product(a, b).float() * scale, count)
    for path in every_path():
        found, at = run(a, b, scale, count)
        assert found.dtype == torch.float32
        assert torch.equal(at, index), path
        assert torch.equal(torch.nan_to_num(found, 7.0), torch.nan_to_num(values, 7.0)), path
        assert torch.equal(found.isnan(), values.isnan()), path


@pytest.fixture
def threads() -> Iterator[None]:
    """Undoes torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("queries", [1, 2, 7, 8, 15, 16, 17, 33, 70])
def test_queries_rows_and_columns(queries: int) -> None:
    for i, (n, k, count) in enumerate(
        ((1, 5, 1), (9, 64, 9), (33, 100, 10), (300, 513, 1), (700, 77, 40), (900, 512, 10))
    ):
        a_kind, b_kind = list(KINDS.values())[i], list(KINDS.values())[(i * queries) % len(KINDS)]
        check(random_rows(queries, k, BINARY), random_rows(n, k, BINARY), count)
        check(random_rows(queries, k, a_kind), random_rows(n, k, b_kind), count)
        check_scaled(random_rows(queries, k, a_kind), random_rows(n, k, b_kind), torch.randn(n), count)


@compiled
@pytest.mark.parametrize("count", [1, 2, 16, 17, 500])
def test_equal_scores_come_in_their_order(count: int) -> None:
    a = random_rows(20, 6, BINARY)  # 7 different scores
    b = random_rows(500, 6, BINARY)
    check(a, b, count)
    check(a, rows_of(torch.ones(1, 500, 6, dtype=torch.bool), BINARY), count)
    check_scaled(a, b, torch.ones(500), count)
    check_scaled(a, b, torch.zeros(500), count)  # -0.0 equals 0.0


@compiled
def test_rising_and_falling_scores() -> None:
    """Every row is a candidate, or none but the first."""
    steps = torch.arange(600)[:, None] > torch.arange(600)
    for bits in (steps, steps.flip(0)):
        b = rows_of(bits[None], BINARY)
        check(rows_of(torch.ones(1, 18, 600, dtype=torch.bool), BINARY), b, 10)


@compiled
def test_special_scales() -> None:
    a, b = random_rows(18, 70, BINARY), random_rows(200, 70, BINARY)
    for count in (1, 5, 30, 200):
        for some in ((float("nan"),) * 20, (float("inf"), float("-inf")), (float("nan"), 1e-40, -1e-40, 0.0, -0.0)):
            scale = torch.randn(200)
            scale[torch.arange(len(some)) * 7] = torch.tensor(some)
            check_scaled(a, b, scale, count)


@compiled
def test_integers_that_float32_does_not_hold() -> None:
    k, n = 2000, 64
    bits = torch.ones(3, n, k, dtype=torch.bool)
    for j in range(n):
        bits[0, j, :j] = False  # scores differ by 4 of 6 million
    kind = KINDS["any weights"]._replace(weights=(1, 55, 70), offset=1)
    check(rows_of(torch.ones(1, 3, k, dtype=torch.bool), KINDS["largest"]), rows_of(bits, kind), 20)
    assert product(rows_of(torch.ones(1, 1, k, dtype=torch.bool), KINDS["largest"]), rows_of(bits, kind)).max() > 2**24


@compiled
def test_the_same_with_any_number_of_threads(threads: None) -> None:
    for queries in (1, 40):
        a, b = random_rows(queries, 40, BINARY), random_rows(30_000, 40, BINARY)
        scale = torch.rand(30_000)
        values, index = sorted_all(product(a, b), 25)
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for engine in (1, 3):
                if _C.has_bit_engine(engine):
                    cpp_bgemm.ENGINE = engine
                    try:
                        found, at = run(a, b, None, 25)
                        assert torch.equal(at, index) and torch.equal(found.long(), values)
                        runs.append(run(a, b, scale, 25))
                    finally:
                        cpp_bgemm.ENGINE = -1
        assert all(torch.equal(x, y) for one in runs for x, y in zip(one, runs[0], strict=True))


@compiled
def test_nothing_to_find() -> None:
    a, b = random_rows(3, 10, BINARY), random_rows(4, 10, BINARY)
    for _ in every_path():
        assert [t.shape for t in run(a, b, None, 0)] == [(3, 0), (3, 0)]
        assert [t.shape for t in run(a.first(0), b, None, 2)] == [(0, 2), (0, 2)]
    for count in (-1, 5):
        with pytest.raises(ValueError, match="count must be 0 to 4"):
            run(a, b, None, count)
    with pytest.raises(ValueError, match="b_scale must be"):
        run(a, b, torch.ones(3), 1)


# ---------------------------------------------------------------------------------------- the public function


def brute_force(queries: BitTensor, database: BitTensor) -> Tensor:
    """Products in float64, without scales."""
    plain = [unpack_bits(bits._replace(scale=None), torch.float32).double() for bits in (queries, database)]
    return plain[0] @ plain[1].T


def test_distances_of_binary_codes() -> None:
    queries, database = pack_bits(torch.randn(5, 100)), pack_bits(torch.randn(60, 100))
    distances, index = hamming_topk(queries, database, 7)
    bits = [unpack_bits(t, torch.float32) > 0 for t in (queries, database)]
    right = (bits[0][:, None] != bits[1]).sum(-1)
    assert distances.dtype == torch.int32 and index.dtype == torch.int64
    wanted, at = right.sort(dim=1, stable=True)
    assert torch.equal(distances.long(), wanted[:, :7]) and torch.equal(index, at[:, :7])


def test_scores_of_codes_with_norms() -> None:
    queries, database = (pack_codes(torch.randn(r, 90), 0.5, 2, odd=True) for r in (6, 50))
    norms = unpack_bits(database._replace(scale=None), torch.float32).norm(dim=1)
    assert database.scale is not None
    for given, scale in ((database._replace(scale=None), 1.0), (database, float(database.scale))):
        for inverse in (None, 1 / norms):
            scores, index = hamming_topk(queries, given, 8, inverse_norms=inverse)
            right = brute_force(queries, given).float() * (scale * (1 if inverse is None else inverse))
            wanted, at = right.sort(dim=1, descending=True, stable=True)
            assert scores.dtype == (torch.int32 if inverse is None and given.scale is None else torch.float32)
            assert torch.equal(index, at[:, :8])
            torch.testing.assert_close(scores.float(), wanted[:, :8], rtol=1e-6, atol=0)


def test_leading_dimensions_and_compile() -> None:
    queries, database = pack_bits(torch.randn(2, 3, 40)), pack_bits(torch.randn(20, 40))
    eager = hamming_topk(queries, database, 4)
    assert eager[0].shape == eager[1].shape == (2, 3, 4)
    compiled = torch.compile(hamming_topk, fullgraph=True, backend="aot_eager")(queries, database, 4)
    assert all(torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))


def test_every_backend_finds_the_same() -> None:
    queries, database = pack_bits(torch.randn(4, 70)), pack_bits(torch.randn(90, 70))
    with fastloss.use_backend("reference"):
        right = hamming_topk(queries, database, 9)
    assert all(torch.equal(x, y) for x, y in zip(right, hamming_topk(queries, database, 9), strict=True))


def test_errors() -> None:
    queries, database = pack_bits(torch.randn(4, 70)), pack_bits(torch.randn(9, 70))
    for count in (0, 10, -1, 2.0, True):
        with pytest.raises(ValueError, match="count must be 1 to 9"):
            hamming_topk(queries, database, count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inverse_norms"):
        hamming_topk(queries, database, 1, inverse_norms=torch.ones(4))
    with pytest.raises(ValueError, match="inverse_norms"):
        hamming_topk(queries, database, 1, inverse_norms=torch.ones(9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        hamming_topk(queries, pack_bits(torch.randn(9, 71)), 1)
    with pytest.raises(TypeError, match="BitTensor"):
        hamming_topk(torch.ones(3), database, 1)  # type: ignore[arg-type]
