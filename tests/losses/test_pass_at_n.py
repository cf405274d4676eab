"""pass@n in float32 over every margin and budget, against arithmetic with 200 digits; sequences and steps."""

from __future__ import annotations

from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import losses

BUDGETS = (1, 16, 256, 4096)
MARGINS = [-120 + 1.25 * i for i in range(129)]  # to 40


def truth(p: Any, n: float) -> tuple[float, float]:
    """(-log(1 - (1 - p)^n), its derivative by log p)."""
    fail = (1 - p) ** n
    return float(-mpmath.log(1 - fail)), float(-n * (1 - p) ** (n - 1) * p / (1 - fail))


@pytest.mark.parametrize("n", BUDGETS)
def test_every_margin(n: int) -> None:
    """Relative error below 1e-6 where the exponent n log(1 - p) itself is known to that: its rounding is 2 eps of it."""
    d = torch.tensor(MARGINS, requires_grad=True)
    z = torch.stack((d, torch.zeros_like(d)), 1)
    rows = fastloss.row_loss(z, torch.zeros(len(d), dtype=torch.int64), losses.pass_at_n, n=n, reduction="none")
    (slope,) = torch.autograd.grad(rows.sum(), d)
    assert rows.isfinite().all() and slope.isfinite().all()
    with mpmath.workdps(200):
        for i, margin in enumerate(MARGINS):
            p = 1 / (1 + mpmath.exp(-mpmath.mpf(margin)))
            value, by_logp = truth(p, n)
            exponent = float(n * mpmath.log(1 + mpmath.exp(mpmath.mpf(margin))))
            rounding = 1e-6 + 2.4e-7 * exponent * (n > 1)
            assert abs(rows[i].item() - value) <= rounding * value + 1e-37
            expected = by_logp * float(1 / (1 + mpmath.exp(mpmath.mpf(margin))))
            assert abs(slope[i].item() - expected) <= 3 * rounding * abs(expected) + 1e-37


def test_one_try_is_cross_entropy() -> None:
    z, y = torch.randn(20, 9), torch.randint(0, 9, (20,))
    for n in (1, 1.0, torch.ones(20)):
        ours = fastloss.row_loss(z, y, losses.pass_at_n, n=n, reduction="none")
        assert torch.equal(ours, fastloss.row_loss(z, y, losses.logistic, reduction="none"))


@pytest.mark.parametrize("n", [1, 3.5, 64, torch.tensor([1.0, 1, 4, 64, 1e4, 2, 2, 2])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sequence(n: float | Tensor, dtype: torch.dtype) -> None:
    """log P from -700 to 0; the gradient is -F."""
    logp = torch.tensor([-700.0, -95, -30, -12, -9.3, -1, -1e-6, 0], dtype=dtype, requires_grad=True)
    rows = losses.pass_at_n_sequence(logp, n=n)
    (gradient,) = torch.autograd.grad(rows.sum(), logp)
    budgets = torch.as_tensor(n, dtype=torch.float64).expand(8).tolist()
    rtol = 3e-6 if dtype == torch.float32 else 1e-12
    with mpmath.workdps(700):
        for i, budget in enumerate(budgets):
            p = mpmath.exp(mpmath.mpf(logp[i].item()))
            value, slope = truth(p, budget) if p < 1 else (0.0, -1.0 if budget == 1 else 0.0)
            assert rows[i].item() == pytest.approx(value, rel=rtol, abs=1e-37)
            assert gradient[i].item() == pytest.approx(slope, rel=rtol, abs=1e-37)


def test_steps() -> None:
    """Each step's tokens are summed; a negative step is left out; every token of a step has the step's gradient."""
    logp = (-torch.rand(3, 5, dtype=torch.float64)).requires_grad_()
    step = torch.tensor([[0, 0, 1, 1, 1], [3, 3, -1, -1, 0], [1, -1, 3, 3, 3]])
    n = torch.tensor([1.0, 4, 8, 16, 2], dtype=torch.float64)
    ours = losses.pass_at_n_step(logp, step, n=n, steps=5)
    sums = torch.stack([logp[step == s].sum() for s in range(5)])
    expected = torch.where(sums == 0, 0.0, -torch.log(1 - (1 - sums.exp()) ** n))
    torch.testing.assert_close(ours, expected)
    gradient, whole = (torch.autograd.grad(v[[0, 1, 3]].sum(), logp)[0] for v in (ours, expected))
    torch.testing.assert_close(gradient, whole)
    assert (gradient[step < 0] == 0).all() and ours[2] == 0
    assert losses.pass_at_n_step(logp, step).shape == (4,)
    assert losses.pass_at_n_step(logp[:0], step[:0]).shape == (0,)
    with pytest.raises(ValueError, match="shape of logp"):
        losses.pass_at_n_step(logp, step[:2])
    with pytest.raises(ValueError, match="n must be > 0, got -1"):
        losses.pass_at_n_sequence(logp, n=-1)
