"""The CPU kernel of `pair_stats` where numbers or sets are extreme, and what calls may count on."""

from __future__ import annotations

import pytest
import torch

from fastloss import backend_cpp
from fastloss.contract import PairWant
from fastloss.pairs import cpp
from fastloss.pairs.pairing import Pairing
from fastloss.registry import use_backend
from pair_checks import (
    ALL_NEEDS,
    BF16,
    F16,
    F32,
    FEATURES,
    FEATURES_OF_65,
    INF,
    D,
    M,
    N,
    _ops,
    call,
    check,
    isa,
    noise,
    operands,
    upstream_of,
)  # fmt: skip

__all__ = ["isa"]  # a fixture
pytestmark = pytest.mark.skipif(backend_cpp.MISSING is not None, reason=str(backend_cpp.MISSING))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("value", [-106.0, -900.0, 1e4])
def test_far_from_zero(isa: int, value: float, dtype: torch.dtype) -> None:
    """All scores near one number, and another one in each half of the rows and columns."""
    args = operands(65, 130, 32, dtype, scale=1.0)
    args["q"][:, 0], args["k"][:, 0] = 8.0, abs(value) ** 0.5 / 8
    args["row_scale"] = torch.full((65,), value / abs(value) * abs(value) ** 0.5)
    for more in ({"positive_diagonals": (0,)}, FEATURES_OF_65):
        check(args | more, largest=abs(value))
        check(args | more, want=int(PairWant.MEAN | PairWant.SECOND), largest=abs(value))
    args["row_scale"][::2] /= 50
    check(args | {"positive_diagonals": (0,)}, largest=abs(value))
    check(
        args | {"positive_diagonals": (0,), "column_scale": torch.where(torch.arange(130) % 3 == 0, 0.01, 1.0)},
        largest=abs(value),
    )


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_scales(isa: int, scale: float) -> None:
    for dtype in (F32, BF16):
        check(operands(65, 70, 64, dtype, scale) | {"positive_diagonals": (0,)}, largest=max(16.0, scale))


def test_empty_sets(isa: int) -> None:
    """-inf and no gradient, never NaN: rows without negatives, without positives, without anything."""
    one = torch.zeros(33, dtype=torch.int32)
    all_positive = {"positive_rows": one, "positive_columns": torch.zeros(40, dtype=torch.int32)}
    nothing = {"excluded_rows": one, "excluded_columns": torch.zeros(40, dtype=torch.int32)}
    no_columns = {"column_valid": torch.zeros(40, dtype=torch.uint8), "positive_diagonals": (0,)}
    half = {"row_valid": torch.tensor([1, 0, 0] * 11, dtype=torch.uint8), "positive_diagonals": (0,)}
    for more in (all_positive, nothing, no_columns, half, {"low": torch.full((33,), 1e9)}):
        check(operands(33, 40, 20, F32) | more, want=7)
        _, made = call("cpp", operands(33, 40, 20, BF16) | more, 7, 0, upstream_of(33, 40, 7), int(ALL_NEEDS))
        assert all(g.isfinite().all() for g in made)
    _, made = call("cpp", operands(33, 40, 20, F32) | nothing, 7, 0, upstream_of(33, 40, 7), int(ALL_NEEDS))
    assert not any(g.any() for g in made)


@pytest.mark.parametrize("m, n", [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_columns(m: int, n: int) -> None:
    check(operands(m, n, 8, F32) | {"positive_diagonals": (0,)})


def test_nan_counts_where_it_is_used(isa: int) -> None:
    """A NaN row makes its own statistics NaN and, as the column of another row, theirs; excluded, it is not seen."""
    for more in ({"positive_diagonals": (0,)}, FEATURES_OF_65):
        args = operands(65, 130, 32, F32) | more
        args["q"][3] = float("nan")
        args["k"][100, 5] = float("nan")
        args["column_valid"] = (torch.arange(130) != 100).to(torch.uint8)
        ours = call("cpp", args, 7, 0, upstream_of(65, 130, 7), int(ALL_NEEDS))
        exact = call("reference", args, 7, 0, upstream_of(65, 130, 7), int(ALL_NEEDS))
        for a, b in zip([t for s in ours for t in s], [t for s in exact for t in s], strict=True):
            assert torch.equal(a.isnan(), b.isnan())
        assert not any(table.isnan().all() for table in ours[0])


def test_rows_that_are_not_valid_may_hold_anything(isa: int) -> None:
    for dtype in (F32, BF16, F16):
        args = operands(70, 300, 48, dtype) | FEATURES["valid"]
        args["q"][args["row_valid"] == 0] = float("nan")
        args["k"][args["column_valid"] == 0] = INF
        check(args)


def test_duplicate_rows(isa: int) -> None:
    args = operands(64, 64, 48, F32) | {"positive_diagonals": (0,)}
    args["k"] = args["k"][torch.arange(64) // 2]
    check(args)


def test_strided_rows(isa: int) -> None:
    for dtype in (F32, BF16):
        args = operands(65, 70, 48, dtype)
        wide = torch.full((70, 100), float("nan"), dtype=dtype)
        wide[:, 7:55] = args["k"]
        args["k"], args["q"] = wide[:, 7:55], args["q"].t().contiguous().t()
        check(args | {"positive_diagonals": (0,)})


@pytest.mark.parametrize("needs", range(16))
def test_needs(needs: int) -> None:
    """What is not needed comes back empty, and the rest is the same."""
    args = operands(65, 70, 48, F32) | {"positive_diagonals": (0,), "column_scale": noise(70, seed=3)}
    upstream = upstream_of(65, 70, 1)
    _, made = call("cpp", args, 1, 0, upstream, needs)
    _, all_made = call("cpp", args, 1, 0, upstream, 15)
    for bit, (a, b) in enumerate(zip(made, all_made, strict=True)):
        assert torch.equal(a, b) if needs >> bit & 1 else a.numel() == 0


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_kept_products(isa: int, dtype: torch.dtype) -> None:
    """Products kept in the forward change no bit, however many fit; and what another forward kept is not read."""
    for more in ({"positive_diagonals": (0,)}, FEATURES["ids"], FEATURES["window"]):
        args, upstream = operands(M, N, D, dtype) | more, upstream_of(M, N, 1)
        everything = cpp.kept_floats(M, N)
        tables, plain = call("cpp", args, 1, 0, upstream, 15)
        for keep in (5, 2000, 5000, everything, everything + 77):
            for a, b in zip(plain, call("cpp", args, 1, keep, upstream, 15)[1], strict=True):
                assert torch.equal(a, b)
        stale = torch.full((everything,), 3.0)
        p = Pairing(**args)
        with use_backend("cpp"):
            made = _ops.pair_stats_backward(
                *(g.float() for g in upstream), *tables, stale, *p, None, None, 1, 1.0, everything, 15
            )
        assert all(torch.equal(a, b) for a, b in zip(plain, made, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_runs_and_threads_are_bit_equal(isa: int, dtype: torch.dtype) -> None:
    args, upstream = operands(300, 1100, 40, dtype) | {"positive_diagonals": (0,)}, upstream_of(300, 1100, 7)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        tables, made = call("cpp", args, 7, 3000, upstream, 15)
        results.append([*tables, *made])
    torch.set_num_threads(before)
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_any_forward_pairs_with_any_backward() -> None:
    """The backward takes the reference's statistics, with memory that nobody filled."""
    args, upstream = operands(M, N, D, F32) | FEATURES["margin_ids"], upstream_of(M, N, 7)
    boost, margin = None, args.pop("margin")
    p = Pairing(**args)
    with use_backend("reference"):
        rows, columns, kept = _ops.pair_stats(*p, boost, margin, 7, 1.3, cpp.kept_floats(M, N))
        tail = (rows, columns, kept, *p, boost, margin, 7, 1.3, kept.numel(), 15)
        exact = _ops.pair_stats_backward(*(g.float() for g in upstream), *tail)
    with use_backend("cpp"):
        ours = _ops.pair_stats_backward(*(g.float() for g in upstream), *tail)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_why_not() -> None:
    """float64 has no compiled kernel; the reason says so."""
    args = operands(4, 5, 8, F32)
    p = Pairing(**(args | {"q": args["q"].double(), "k": args["k"].double()}))
    assert "float64" in str(cpp.why_not(*p, None, None, 1, 1.0, 0))
    assert cpp.why_not(*Pairing(**args), None, None, 1, 1.0, 0) is None
