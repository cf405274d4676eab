"""Losses that are functions of the margin alone: one line each in LOSSES, with the formula in terms of p_y."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastloss
import row_loss_checks as checks
from fastloss import losses
from row_loss_checks import Case, target_probability

EXTREME = [-120.0, -100.0, -87.5, -60.0, -33.0, -17.0, -5.0, -0.5, 0.1, 0.7, 4.0, 16.7, 20.0, 41.0, 70.0, 100.0, 120.0]
OFFERED = {  # what a formula may use besides arithmetic: the same for tensors and for mpmath's numbers
    "torch": SimpleNamespace(
        log=torch.log, log1p=torch.log1p, larger=lambda p, k: p.clamp(min=k), pick=torch.where, exact=float
    ),
    "mpmath": SimpleNamespace(
        log=mpmath.log,
        log1p=mpmath.log1p,
        larger=max,
        pick=lambda condition, a, b: a if condition else b,
        exact=mpmath.mpf,
    ),
}

# name: (loss, parameters, formula of p, lowest d at which it is compared); published in this form, computed in another
LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Any], Callable[[Any, Any], Any], float]] = {
    "logistic": (losses.logistic, {}, lambda p, m: -m.log(p), -120),
    "comp-sum 1": (losses.comp_sum, {"tau": 1.0}, lambda p, m: -m.log(p), -120),
    "comp-sum 0.5": (losses.comp_sum, {"tau": 0.5}, lambda p, m: ((1 / p) ** 0.5 - 1) / 0.5, -120),
    "comp-sum 1.3": (losses.comp_sum, {"tau": 1.3}, lambda p, m: ((1 / p) ** -0.3 - 1) / -0.3, -120),
    "comp-sum 3": (losses.comp_sum, {"tau": 3.0}, lambda p, m: (p**2 - 1) / -2, -120),
    "sum-exponential": (losses.sum_exponential, {}, lambda p, m: 1 / p - 1, -79),
    "GCE 0.7": (losses.generalized_cross_entropy, {}, lambda p, m: (1 - p**0.7) / 0.7, -120),
    "GCE 0.2": (losses.generalized_cross_entropy, {"q": 0.2}, lambda p, m: (1 - p**0.2) / 0.2, -120),
    "TGCE": (losses.truncated_generalized_cross_entropy, {}, lambda p, m: (1 - m.larger(p, 0.5) ** 0.7) / 0.7, -120),
    "TGCE 0": (losses.truncated_generalized_cross_entropy, {"k": 0.0}, lambda p, m: (1 - p**0.7) / 0.7, -120),
    "MAE": (losses.mean_absolute_error, {}, lambda p, m: 1 - p, -120),
    "MAE 2": (losses.mean_absolute_error, {"factor": 2.0}, lambda p, m: 2 * (1 - p), -120),
    "focal": (losses.focal, {}, lambda p, m: -((1 - p) ** 2) * m.log(p), -120),
    "focal 0": (losses.focal, {"gamma": 0}, lambda p, m: -m.log(p), -120),
    "focal 0.5": (losses.focal, {"gamma": 0.5}, lambda p, m: -((1 - p) ** 0.5) * m.log(p), -120),
    "adaptive focal": (losses.adaptive_focal, {}, lambda p, m: -((1 - p) ** m.pick(p < 0.2, 5, 3)) * m.log(p), -120),
    "adaptive focal, three": (
        losses.adaptive_focal, {"gamma": 0.0, "below": ((0.2, 5.0), (0.5, 2.0))},
        lambda p, m: -((1 - p) ** m.pick(p < 0.2, 5, m.pick(p < 0.5, 2, 0))) * m.log(p), -120,
    ),
    "unlikelihood": (losses.unlikelihood, {}, lambda p, m: -m.log(1 - p), -120),
    "SCE": (losses.symmetric_cross_entropy, {}, lambda p, m: -0.5 * m.log(p) + 0.5 * 4 * (1 - p), -120),
    "SCE 0.1": (
        losses.symmetric_cross_entropy, {"balance": 0.125, "A": 6.0}, lambda p, m: -0.875 * m.log(p) + 0.75 * (1 - p), -120
    ),
    "AUL": (losses.asymmetric_unhinged, {}, lambda p, m: ((1.5 - p) ** 0.9 - m.exact(0.5) ** 0.9) / 0.9, -120),
    "AUL 5, 3": (losses.asymmetric_unhinged, {"a": 5.0, "q": 3.0}, lambda p, m: ((5 - p) ** 3 - 4**3) / 3, -120),
    "AGCE": (losses.asymmetric_generalized, {}, lambda p, m: (4 - (1 + p) ** 2) / 2, -120),
    "AGCE 4, 0.2": (
        losses.asymmetric_generalized, {"a": 4.0, "q": 0.2}, lambda p, m: (m.exact(5) ** 0.2 - (4 + p) ** 0.2) / 0.2, -120
    ),
    "pass@16": (losses.pass_at_n, {}, lambda p, m: -m.log1p(-((1 - p) ** 16)), -120),
    "pass@1": (losses.pass_at_n, {"n": 1}, lambda p, m: -m.log(p), -120),
    "pass@2.5": (losses.pass_at_n, {"n": 2.5}, lambda p, m: -m.log1p(-((1 - p) ** 2.5)), -120),
}  # fmt: skip


def case(name: str) -> Case:
    loss, parameters, formula, _ = LOSSES[name]
    return Case(name, loss, lambda z, y: formula(target_probability(z, y), OFFERED["torch"]), parameters)


@pytest.mark.parametrize("name", LOSSES)
def test_float64(name: str) -> None:
    checks.check_float64(case(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_kernels(name: str, dtype: torch.dtype) -> None:
    checks.check_kernels(case(name), dtype)


@pytest.mark.parametrize("name", LOSSES)
def test_linear_head(name: str) -> None:
    checks.check_linear_head(case(name))


@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_do_not_count(name: str) -> None:
    checks.check_ignored_rows(case(name))
    checks.check_only_class(case(name))


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_margins(name: str) -> None:
    """Float32 values and gradients from p = e^-120 to 1 - e^-120, against arithmetic with 120 digits."""
    loss, parameters, formula, lowest = LOSSES[name]
    margins = [d for d in EXTREME if d >= lowest]
    z = torch.tensor([[d, 0.0] for d in margins], requires_grad=True)
    y = torch.zeros(len(margins), dtype=torch.int64)
    rows = fastloss.row_loss(z, y, loss, reduction="none", **parameters)
    (gradient,) = torch.autograd.grad(rows.sum(), z)
    with mpmath.workdps(120):

        def phi(d: Any) -> Any:
            return formula(1 / (1 + mpmath.exp(-d)), OFFERED["mpmath"])

        values = [float(phi(mpmath.mpf(d))) for d in margins]
        slopes = [float(mpmath.diff(phi, mpmath.mpf(d))) for d in margins]
    for ours, truth in ((rows, values), (gradient[:, 0], slopes), (-gradient[:, 1], slopes)):
        expected = torch.tensor(truth, dtype=torch.float64)
        torch.testing.assert_close(ours.detach().double(), expected, rtol=2e-5, atol=1e-36)


def test_beyond_the_largest_exponent() -> None:
    """Where e^(-d) is no number any more, the loss is a rising straight line and the gradient its slope."""
    z = torch.tensor([[-d, 0.0] for d in (79.0, 81.0, 90.0, 120.0, 500.0)], requires_grad=True)
    rows = fastloss.row_loss(z, torch.zeros(5, dtype=torch.int64), losses.sum_exponential, reduction="none")
    (gradient,) = torch.autograd.grad(rows.sum(), z)
    assert rows.isfinite().all() and (rows.diff() > 0).all()
    torch.testing.assert_close(gradient[1:, 0], torch.full((4,), -80.0).exp().reciprocal().neg(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[0, 0], -torch.tensor(79.0).exp(), rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(-120, 120, width=32), min_size=2, max_size=12), st.sampled_from(sorted(LOSSES)))
def test_monotone_in_the_margin(margins: list[float], name: str) -> None:
    """Every one of these falls when the target gains on the rest; unlikelihood rises."""
    if name.startswith("adaptive"):  # whose gamma jumps
        return
    loss, parameters, *_ = LOSSES[name]
    d = torch.tensor(sorted(margins))
    z = torch.stack((d, torch.zeros_like(d)), 1).requires_grad_()
    rows = fastloss.row_loss(z, torch.zeros(len(d), dtype=torch.int64), loss, reduction="none", **parameters)
    (gradient,) = torch.autograd.grad(rows.sum(), z)
    up = name == "unlikelihood"
    steps = rows.detach().diff() * (1 if up else -1)
    assert (steps >= -4e-6 * rows.detach()[1:].abs().clamp(min=1e-30)).all()
    assert (gradient[:, 0] >= 0).all() if up else (gradient[:, 0] <= 0).all()


@pytest.mark.parametrize(
    ("loss", "parameters", "message"),
    [
        (losses.comp_sum, {"tau": -1.0}, "tau must be >= 0, got -1.0"),
        (losses.generalized_cross_entropy, {"q": 0.0}, "q must be > 0, got 0.0"),
        (losses.truncated_generalized_cross_entropy, {"k": 1.0}, r"k must be in \[0, 1\), got 1.0"),
        (losses.focal, {"gamma": -1}, "gamma must be >= 0, got -1"),
        (losses.adaptive_focal, {"below": ((0.5, 2.0), (0.2, 5.0))}, "thresholds must increase"),
        (losses.symmetric_cross_entropy, {"balance": 2.0}, r"balance must be in \[0, 1\], got 2.0"),
        (losses.asymmetric_unhinged, {"a": 1.0}, "a must be > 1, got 1.0"),
        (losses.asymmetric_generalized, {"a": 0.0}, "a must be > 0, got 0.0"),
        (losses.pass_at_n, {"n": 0}, "n must be > 0, got 0"),
    ],
)
def test_errors_say_what_was_given(loss: Callable[..., Tensor], parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastloss.row_loss(torch.randn(3, 5), torch.tensor([0, 1, 2]), loss, **parameters)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.7, 2.0])
def test_smooth_adversarial_comp_sum(tau: float) -> None:
    """The norm of the change of all margins, from three numbers a row; 0 with gradient 0 where nothing changed."""
    z, y = checks.problem(torch.float64)
    attack = torch.randn_like(z) * 0.3 + 50  # an offset changes no margin
    attack[4] = 0
    leaves = [t.clone().requires_grad_() for t in (z, z + attack)]
    clean, moved = leaves
    ours = losses.smooth_adversarial_comp_sum(
        fastloss.row_stats(clean, y), fastloss.row_stats(moved - clean, y, stats="sumsq"), tau=tau, nu=0.7
    )
    wide = [t.detach().clone().requires_grad_() for t in leaves]
    column = y.clamp(min=0)[:, None]
    p = target_probability(wide[0], column[:, 0])
    base = -p.log() if tau == 1 else (p ** (tau - 1) - 1) / (1 - tau)
    margins = [t.gather(1, column) - t for t in wide]
    change = margins[1] - margins[0]
    still = (change == 0).all(1)
    norm = torch.where(still, 0.0, torch.where(still[:, None], 1.0, change).norm(dim=1))
    truth = torch.where(y == -100, 0.0, base + 0.7 * norm)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(truth.sum(), wide), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"shapes \(9,\) and \(3,\)"):
        losses.smooth_adversarial_comp_sum(fastloss.row_stats(z, y), fastloss.row_stats(z[:3], y[:3], stats="sumsq"))
