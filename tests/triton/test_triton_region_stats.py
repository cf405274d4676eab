"""region_stats of the Triton backend, interpreted, against float64 and torch in the same dtype."""

from __future__ import annotations

import pytest
import torch
from fastloss.triton_kernels import region_stats as kernels
from torch import Tensor

import region_formulas
from fastloss.region_ops import merge
from fastloss.region_statistics import region_coefficients
from region_formulas import BCE, ENTROPY, PROBABILITIES, SHARP, SQUARED
from tolerance import check_close, check_gradient

ALL = SQUARED | BCE | ENTROPY


def check(x: Tensor, t: Tensor, mask: Tensor | None, want: int, splits: int, block: int = 32) -> None:
    g = torch.rand(10, len(x), dtype=torch.float64) - 0.5
    results = []
    for dtype in (torch.float64, x.dtype):
        leaf = x.where(x.isfinite(), torch.full_like(x, -1e3)).to(dtype).requires_grad_()
        wide = leaf if dtype == torch.float64 else leaf.float()
        stats = region_formulas.statistics(wide, t, mask, want, 5.0)
        results.append((stats, torch.autograd.grad(stats, leaf, g.to(stats.dtype))[0]))
    (stats64, grad64), (stats_torch, grad_torch) = results
    stats = merge(kernels.region_stats(x, t, mask, want, 5.0, splits, block))
    check_close(stats.flatten()[:, None], stats_torch.flatten()[:, None], stats64.flatten()[:, None], torch.float32)
    coef = region_coefficients(g.float())
    ours = kernels.region_stats_backward(coef, x, t, mask, want, 5.0, block)
    check_gradient(ours, grad_torch, grad64, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("want", [0, ALL, ALL | SHARP, SQUARED | PROBABILITIES, SHARP | PROBABILITIES])
def test_statistics_and_gradient(dtype: torch.dtype, want: int) -> None:
    for (r, p), splits in [((2, 5), 1), ((4, 203), 2)]:
        x, t = torch.randn(r, p) * 3, torch.rand(r, p) < 0.3
        x = (x.sigmoid() if want & PROBABILITIES else x).to(dtype)
        mask = torch.rand(r // 2, p) < 0.6 if splits == 2 else None
        check(x, t if splits == 1 else t.to(dtype if want else torch.float32), mask, want, splits, 64)


def test_hard_regions() -> None:
    x, t = torch.randn(6, 67) * 3, torch.rand(6, 67) < 0.3
    far = torch.linspace(15, 120, 67)
    x[1], x[2] = torch.where(t[1], far, -far), torch.where(t[2], -far, far)
    x[3] += 1e4
    x[4], x[5, 30], t[5, 30] = -200, -torch.inf, False
    check(x, t, None, ALL, 2)
    x[0, 5] = torch.nan
    mask = torch.ones(6, 67, dtype=torch.bool)
    mask[0, 5] = False
    stats = merge(kernels.region_stats(x, t, mask, ALL, 1.0, 2, 32))
    assert stats.isfinite().all() and stats[0, 0] == 66
    coef = torch.full((5, 6), torch.nan)
    assert kernels.region_stats_backward(coef, x, t, mask, ALL, 1.0, 32)[0, 5] == 0
    assert merge(kernels.region_stats(x, t, None, ALL, 1.0, 2, 32))[2:6, 0].isnan().all()


def test_backend() -> None:
    """By the op, with the launcher's own blocks, paired with the reference's backward."""
    import fastloss

    x, t = torch.randn(3, 20_000), torch.rand(3, 20_000) < 0.3
    with fastloss.use_backend("triton"):
        stats = torch.ops.fastloss.region_stats(x, t, None, ALL)
        assert torch.equal(torch.ops.fastloss.region_stats(x[:0], t[:0], None), torch.zeros(10, 0))
        grad = torch.ops.fastloss.region_stats_backward(torch.ones(5, 3), x, t, None, ALL)
    with fastloss.use_backend("reference"):
        torch.testing.assert_close(stats, torch.ops.fastloss.region_stats(x, t, None, ALL), rtol=2e-6, atol=0)
        other = torch.ops.fastloss.region_stats_backward(torch.ones(5, 3), x, t, None, ALL)
    torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-6)
