"""The CPU kernel of `pair_stats` on every instruction set that this machine has: shapes and features."""

from __future__ import annotations

import pytest
import torch

from fastloss import backend_cpp
from fastloss.contract import PairNeeds, PairWant
from pair_checks import (
    BF16,
    F16,
    F32,
    FEATURES,
    D,
    M,
    N,
    check,
    isa,
    operands,
)  # fmt: skip

__all__ = ["isa"]  # a fixture
pytestmark = pytest.mark.skipif(backend_cpp.MISSING is not None, reason=str(backend_cpp.MISSING))


SHAPES = [
    (1, 1, 1),
    (2, 63, 16),
    (64, 65, 48),
    (70, 300, 64),
    (300, 70, 384),
    (65, 64, 640),
    (63, 2, 768),
    (300, 300, 1152),
    (1000, 1000, 48),
    (65, 1000, 16),
    (1000, 2, 384),
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("m, n, d", SHAPES)
def test_shapes(isa: int, m: int, n: int, d: int, dtype: torch.dtype) -> None:
    """Both directions of CLIP."""
    check(operands(m, n, d, dtype) | {"positive_diagonals": (0,)})


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(isa: int, feature: str, dtype: torch.dtype) -> None:
    """Each part of the pairing, with columns; and, without, mean and second."""
    args = operands(M, N, D, dtype) | FEATURES[feature]
    check(args)
    check(
        args | {"second": 1.7}, want=int(PairWant.MEAN | PairWant.SECOND), needs=int(PairNeeds.Q | PairNeeds.ROW_SCALE)
    )


def test_mean_and_second_with_columns(isa: int) -> None:
    for feature in ("column_scale", "ids", "valid", "boost"):
        check(operands(M, N, D, F32) | FEATURES[feature] | {"second": 0.3}, want=7)


@pytest.mark.parametrize("guide_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_guide(isa: int, dtype: torch.dtype, guide_dtype: torch.dtype) -> None:
    """Guides of another dtype and D. Their limit lies between the values, so that rounding decides nothing."""
    guide_q, guide_k = (
        torch.randint(-2, 3, (rows, 37), generator=torch.Generator().manual_seed(rows)) for rows in (M, N)
    )
    guide = {
        "guide_q": guide_q.to(guide_dtype),
        "guide_k": guide_k.to(guide_dtype),
        "guide_limit": torch.full((M,), 4.5),
    }
    check(operands(M, N, D, dtype) | guide | {"positive_diagonals": (0,)})
    check(operands(M, N, D, dtype) | guide | FEATURES["ids"], keep=10**6)
