"""Pairings of every kind, and what float64 makes of them, for the tests of the Triton pair kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.contract import PairFunction, PairWant
from fastloss.pairs import ops, reference, reference_map  # noqa: F401  (ops registers torch.ops.fastloss)
from fastloss.pairs.pairing import Pairing

EVERYTHING = int(PairWant.COLUMNS | PairWant.MEAN | PairWant.SECOND)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def double(x: Any) -> Any:
    """x in float64, if it is a floating tensor."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def operands(m: int, n: int, d: int, dtype: torch.dtype = torch.float32, scale: float = 5.0, **given: Any) -> Pairing:
    """Unit rows, and a scale a row between scale / 2 and 3 scale / 2."""
    q, k = (F.normalize(torch.randn(rows, d), dim=1).to(dtype) for rows in (m, n))
    return Pairing(q, k, (torch.rand(m) + 0.5) * scale, **given)


def features(name: str, m: int, n: int) -> dict[str, Any]:
    """What selects the pairs."""

    def ids(size: int, classes: int) -> Tensor:
        return torch.randint(0, classes, (size,), dtype=torch.int32)

    def bits() -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (m, -(-n // 32)), dtype=torch.int32)

    def valid(size: int) -> Tensor:
        return (torch.rand(size) < 0.7).to(torch.uint8)

    validity = dict(row_valid=valid(m), column_valid=valid(n))
    window = dict(low=torch.full((m,), -1.0), high=torch.rand(m) + 0.5)
    labels = dict(positive_rows=ids(m, 4), positive_columns=ids(n, 4))
    return {
        "nothing": {},
        "diagonal": dict(positive_diagonals=(0,)),
        "two diagonals": dict(positive_diagonals=(2, -3), excluded_diagonals=(0, 2), column_scale=torch.rand(n) + 0.5),
        "queue": dict(positive_diagonals=(0,), excluded_diagonals=(1,), **validity),
        "far diagonals": dict(positive_diagonals=(n, -m), excluded_diagonals=(1 << 40, n - 1)),
        "ids": dict(excluded_diagonals=(0,), **labels),
        "ids and all else": dict(
            positive_diagonals=(1,), excluded_rows=ids(m, 9), excluded_columns=ids(n, 9), column_scale=torch.rand(n) + 0.5,
            **validity, **window, **labels,
        ),
        "excluded ids": dict(positive_diagonals=(0,), excluded_rows=ids(m, 3), excluded_columns=ids(n, 3)),
        "bits": dict(positive_rows=bits(), excluded_rows=bits(), positive_diagonals=(0,)),
        "excluded bits": dict(positive_diagonals=(1, -1), excluded_rows=bits(), **validity),
        "guide": dict(
            positive_diagonals=(0,), guide_q=torch.randn(m, 5), guide_k=torch.randn(n, 5), guide_limit=torch.randn(m), **window
        ),
    }[name]  # fmt: skip


def close(ours: Tensor, truth: Tensor, tolerance: float, name: str = "") -> None:
    """Equal where not finite; else within tolerance of the largest number of the row, or of 1."""
    a, b = ours.double(), truth.double()
    assert a.shape == b.shape, f"{name}: {tuple(a.shape)}, expected {tuple(b.shape)}"
    same = (a == b) | (a.isnan() & b.isnan())
    wrong = ~(same | ((a - b).abs() <= tolerance * b.nan_to_num(0, 0, 0).abs().clamp(min=1.0)))
    assert not wrong.any(), f"{name}: {wrong.nonzero()[:5].tolist()}, ours {a[wrong][:5]}, truth {b[wrong][:5]}"


def close_gradients(
    ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype, slack: float = 1.0
) -> None:
    """Relative L2 over all, and no element far off. Below 0.1 random upstream gradients cancel."""
    for name, a, b in zip(("dq", "dk", "drow_scale", "dcolumn_scale"), ours, truth, strict=True):
        assert a.shape == b.shape, f"{name}: {tuple(a.shape)}, expected {tuple(b.shape)}"
        if not b.numel():
            continue
        a, tolerance = a.double(), TOLERANCE[dtype] * slack
        assert a.isfinite().all(), f"{name} is not finite"
        error = (a - b).norm() / b.norm().clamp(min=0.1)
        assert error <= tolerance, f"{name}: relative L2 {error:.3g}"
        assert ((a - b).abs() <= 10 * tolerance * b.abs().max().clamp(min=0.1)).all(), f"{name}: an element is far off"


def statistics_truth(p: Pairing, *args: Any) -> tuple[Tensor, Tensor]:
    """(rows, columns) in float64; args: boost, margin, want, second."""
    rows, columns, _ = reference.pair_stats(*map(double, p), *map(double, args), 0)
    return rows, columns


def gradient_truth(grads: tuple[Tensor, Tensor], p: Pairing, *args: Any, needs: int = 15) -> tuple[Tensor, ...]:
    """Gradients in float64 from float64 statistics."""
    rows, columns = statistics_truth(p, *args)
    kept = torch.empty(0)
    return reference.pair_stats_backward(
        *map(double, grads), rows, columns, kept, *map(double, p), *map(double, args), 0, needs
    )


def map_truth(p: Pairing, thresholds: tuple[Tensor | None, ...], function: int, grad: Tensor) -> tuple[Any, ...]:
    """(table, gradients) in float64."""
    args = (*map(double, p), *map(double, thresholds), PairFunction(function))
    return reference_map.pair_map(*args), reference_map.pair_map_backward(grad.double(), *args, 15)
