"""The CPU kernel of `pair_stats` against the reference in float64, on every instruction set that this machine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastloss import backend_cpp
from fastloss.compiled import _C
from fastloss.contract import PairNeeds, PairStat, PairWant
from fastloss.pairs import cpp, ops  # noqa: F401
from fastloss.pairs.pairing import Pairing
from fastloss.registry import use_backend
from tolerance import check_close, check_gradient
from torch import Tensor

_ops = torch.ops.fastloss
INF = float("inf")
LEVELS = {0: "scalar", 1: "avx2", 2: "avx512", 3: "avx512bf16", 4: "amx"}
BEST = 0 if _C is None else _C.best_isa() + (_C.best_isa() == 3 and _C.add_product_why_not(4) is None)
ISAS = [isa for isa in LEVELS if isa <= BEST]
ALL_NEEDS = PairNeeds.Q | PairNeeds.K | PairNeeds.ROW_SCALE | PairNeeds.COLUMN_SCALE
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

pytestmark = pytest.mark.skipif(backend_cpp.MISSING is not None, reason=str(backend_cpp.MISSING))


@pytest.fixture(params=ISAS, ids=lambda isa: LEVELS[isa])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Force one level."""
    monkeypatch.setattr(backend_cpp, "ISA", request.param)
    return int(request.param)


def operands(m: int, n: int, d: int, dtype: torch.dtype, scale: float = 10.0, seed: int = 0) -> dict[str, Any]:
    """Unit rows, near each other on the diagonal, and a scale for each row."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(m, d, generator=g), torch.randn(n, d, generator=g)
    both = min(m, n)
    q[:both] += k[:both]
    q, k = (torch.nn.functional.normalize(x, dim=1).to(dtype) for x in (q, k))
    return {"q": q, "k": k, "row_scale": torch.full((m,), scale)}


def widened(args: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}


def call(
    backend: str, args: dict[str, Any], want: int, keep: int, upstream: tuple[Tensor, Tensor], needs: int
) -> tuple[list[Tensor], list[Tensor]]:
    """(rows, columns), (dq, dk, da, db)."""
    args = dict(args)
    boost, margin, second = args.pop("boost", None), args.pop("margin", None), args.pop("second", 1.0)
    p = Pairing(**args)
    with use_backend(backend):
        rows, columns, kept = _ops.pair_stats(*p, boost, margin, want, second, keep)
        grads = [g.to(rows.dtype) for g in upstream]
        made = _ops.pair_stats_backward(
            *grads, rows, columns, kept, *p, boost, margin, want, second, keep, needs
        )
    return [rows, columns], list(made)


def upstream_of(m: int, n: int, want: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(9, m, generator=g, dtype=torch.float64) + 0.5
    columns = torch.rand(7, n if want & PairWant.COLUMNS else 0, generator=g, dtype=torch.float64) + 0.5
    return rows, columns


def check(args: dict[str, Any], want: int = 1, keep: int = 0, needs: int = int(ALL_NEEDS), largest: float = 16.0) -> None:
    """The cpp kernel agrees with float64 as well as the reference in the same dtype does.

    A softmax of float32 scores loses a unit of rounding for each unit of the `largest` of them, ours as torch's.
    """
    k = 8.0
    (m, n), dtype = (args["q"].shape[0], args["k"].shape[0]), args["q"].dtype
    upstream = upstream_of(m, n, want)
    ours, ours_made = call("cpp", args, want, keep, upstream, needs)
    torchs, torch_made = call("reference", args, want, 0, upstream, needs)
    exact, exact_made = call("reference", widened(args), want, 0, upstream, needs)
    for table, a, b, r in zip(("rows", "columns"), ours, torchs, exact, strict=True):
        for stat in range(a.shape[0] if a.numel() else 0):
            # What counts from the largest score is as exact as that score is: one scale for both.
            largest = PairStat.POS_MAX if stat in (PairStat.POS_MAX, PairStat.POS_LOGSUM) else PairStat.NEG_MAX
            both = [stat] if stat == PairStat.POS_SUM else [largest, stat]
            try:
                check_close(*(t[both].reshape(1, -1) for t in (a, b, r)), F32, k)
            except AssertionError as error:
                raise AssertionError(f"{table} {PairStat(stat).name}: {error}") from error
    for name, a, b, r in zip(("dq", "dk", "da", "db"), ours_made, torch_made, exact_made, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if not a.numel():
            continue
        try:
            if name in ("dq", "dk"):
                check_gradient(a, b, r, dtype, max(k, largest) if dtype == F32 else k)
            else:
                check_close(a[None], b[None], r[None], F32, max(k, 2 * largest))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


SHAPES = [(1, 1, 1), (2, 63, 16), (64, 65, 48), (70, 300, 64), (300, 70, 384), (65, 64, 640), (63, 2, 768), (300, 300, 1152)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("m, n, d", SHAPES)
def test_shapes(isa: int, m: int, n: int, d: int, dtype: torch.dtype) -> None:
    """Both directions of CLIP."""
    check(operands(m, n, d, dtype) | {"positive_diagonals": (0,)})


def labels(count: int, classes: int, seed: int) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def bits(m: int, n: int, share: float, seed: int) -> Tensor:
    """int32 [m, ceil(n / 32)] in which a pair's bit is set with probability `share`; what is beyond n is set too."""
    members = noise(m, -(-n // 32) * 32, seed=seed) < share
    members[:, n:] = True
    words = (members.reshape(m, -1, 32).long() << torch.arange(32)).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


M, N, D = 70, 300, 48
FEATURES: dict[str, dict[str, Any]] = {
    "none": {},
    "column_scale": {"column_scale": noise(N, seed=3) - 0.2, "positive_diagonals": (2,)},
    "row_scale": {"row_scale": 20 * noise(M, seed=4) - 5, "positive_diagonals": (0,)},
    "valid": {
        "row_valid": (noise(M, seed=5) < 0.8).to(torch.uint8), "column_valid": (noise(N, seed=6) < 0.5).to(torch.uint8),
        "positive_diagonals": (0, 3),
    },
    "two_diagonals": {"positive_diagonals": (0, -5), "excluded_diagonals": (1, 40), "column_scale": noise(N, seed=3)},
    "the_same_diagonal": {"positive_diagonals": (4, 4)},
    "excluded_positive": {"positive_diagonals": (0, 1), "excluded_diagonals": (1,)},
    "ids": {"positive_rows": labels(M, 5, 0), "positive_columns": labels(N, 5, 1), "excluded_diagonals": (0,)},
    "rare_ids": {"positive_rows": labels(M, 900, 0), "positive_columns": labels(N, 900, 1), "positive_diagonals": (1,)},
    "excluded_ids": {"excluded_rows": labels(M, 9, 2), "excluded_columns": labels(N, 9, 3), "positive_diagonals": (0,)},
    "bits": {"positive_rows": bits(M, N, 0.02, 7), "excluded_rows": bits(M, N, 0.3, 8)},
    "window": {"low": noise(M, seed=9) - 2, "high": noise(M, seed=10) + 0.5, "positive_diagonals": (0,)},
    "high": {"high": noise(M, seed=10), "positive_rows": labels(M, 20, 0), "positive_columns": labels(N, 20, 1)},
    "boost": {"boost": noise(M, seed=11) + 0.5, "low": noise(M, seed=9) - 2, "positive_diagonals": (0,)},
    "margin": {"margin": noise(M, seed=12), "positive_diagonals": (0, 7)},
    "margin_ids": {"margin": noise(M, seed=12), "positive_rows": labels(M, 9, 0), "positive_columns": labels(N, 9, 1)},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(isa: int, feature: str, dtype: torch.dtype) -> None:
    """Each part of the pairing, with columns; and, without, mean and second."""
    args = operands(M, N, D, dtype) | FEATURES[feature]
    check(args)
    check(args | {"second": 1.7}, want=int(PairWant.MEAN | PairWant.SECOND), needs=int(PairNeeds.Q | PairNeeds.ROW_SCALE))


def test_mean_and_second_with_columns(isa: int) -> None:
    for feature in ("column_scale", "ids", "valid", "boost"):
        check(operands(M, N, D, F32) | FEATURES[feature] | {"second": 0.3}, want=7)


@pytest.mark.parametrize("guide_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_guide(isa: int, dtype: torch.dtype, guide_dtype: torch.dtype) -> None:
    """Guides of another dtype and D. Their limit lies between the values, so that rounding decides nothing."""
    guide_q, guide_k = (torch.randint(-2, 3, (rows, 37), generator=torch.Generator().manual_seed(rows)) for rows in (M, N))
    guide = {"guide_q": guide_q.to(guide_dtype), "guide_k": guide_k.to(guide_dtype), "guide_limit": torch.full((M,), 4.5)}
    check(operands(M, N, D, dtype) | guide | {"positive_diagonals": (0,)})
    check(operands(M, N, D, dtype) | guide | FEATURES["ids"], keep=10**6)


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
    check(args | {"positive_diagonals": (0,), "column_scale": torch.where(torch.arange(130) % 3 == 0, 0.01, 1.0)}, largest=abs(value))


FEATURES_OF_65: dict[str, Any] = {"positive_rows": labels(65, 6, 0), "positive_columns": labels(130, 6, 1)}


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
