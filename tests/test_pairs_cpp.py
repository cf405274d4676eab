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


def check(args: dict[str, Any], want: int = 1, keep: int = 0, needs: int = int(ALL_NEEDS), k: float = 8.0) -> None:
    """The cpp kernel agrees with float64 as well as the reference in the same dtype does."""
    (m, n), dtype = (args["q"].shape[0], args["k"].shape[0]), args["q"].dtype
    upstream = upstream_of(m, n, want)
    ours, ours_made = call("cpp", args, want, keep, upstream, needs)
    torchs, torch_made = call("reference", args, want, 0, upstream, needs)
    exact, exact_made = call("reference", widened(args), want, 0, upstream, needs)
    for table, a, b, r in zip(("rows", "columns"), ours, torchs, exact, strict=True):
        for stat in range(a.shape[0]):
            try:
                check_close(a[stat][None], b[stat][None], r[stat][None], F32, k)
            except AssertionError as error:
                raise AssertionError(f"{table} {PairStat(stat).name}: {error}") from error
    for name, a, b, r in zip(("dq", "dk", "da", "db"), ours_made, torch_made, exact_made, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if not a.numel():
            continue
        try:
            if name in ("dq", "dk"):
                check_gradient(a, b, r, dtype, k)
            else:
                check_close(a[None], b[None], r[None], F32, k if dtype == F32 else 2 * k)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


SHAPES = [(1, 1, 1), (2, 63, 16), (64, 65, 48), (70, 300, 64), (300, 70, 384), (65, 64, 640), (63, 2, 768), (300, 300, 1152)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("m, n, d", SHAPES)
def test_shapes(isa: int, m: int, n: int, d: int, dtype: torch.dtype) -> None:
    """Both directions of CLIP."""
    check(operands(m, n, d, dtype) | {"positive_diagonals": (0,)})
