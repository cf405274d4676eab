"""What the tests of the CPU pair kernels share: problems, and the comparison with the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastloss import backend_cpp
from fastloss.compiled import _C
from fastloss.contract import PairNeeds, PairStat, PairWant
from fastloss.pairs import cpp, ops  # noqa: F401
from fastloss.pairs.pairing import Pairing
from fastloss.registry import use_backend
from tolerance import check_close, check_gradient

_ops = torch.ops.fastloss
INF = float("inf")
LEVELS = {0: "scalar", 1: "avx2", 2: "avx512", 3: "avx512bf16", 4: "amx"}
BEST = 0 if _C is None else _C.best_isa() + (_C.best_isa() == 3 and _C.add_product_why_not(4) is None)
ISAS = [isa for isa in LEVELS if isa <= BEST]
ALL_NEEDS = PairNeeds.Q | PairNeeds.K | PairNeeds.ROW_SCALE | PairNeeds.COLUMN_SCALE
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


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
        made = _ops.pair_stats_backward(*grads, rows, columns, kept, *p, boost, margin, want, second, keep, needs)
    return [rows, columns], list(made)


def upstream_of(m: int, n: int, want: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(9, m, generator=g, dtype=torch.float64) + 0.5
    columns = torch.rand(7, n if want & PairWant.COLUMNS else 0, generator=g, dtype=torch.float64) + 0.5
    return rows, columns


def check(
    args: dict[str, Any], want: int = 1, keep: int = 0, needs: int = int(ALL_NEEDS), largest: float = 16.0
) -> None:
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
            top = PairStat.POS_MAX if stat in (PairStat.POS_MAX, PairStat.POS_LOGSUM) else PairStat.NEG_MAX
            both = [stat] if stat == PairStat.POS_SUM else [top, stat]
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

FEATURES_OF_65: dict[str, Any] = {"positive_rows": labels(65, 6, 0), "positive_columns": labels(130, 6, 1)}
