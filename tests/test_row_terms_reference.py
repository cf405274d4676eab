"""The reference of `row_terms` in float64: every statistic and its gradient against PyTorch's own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import reference_terms
from fastloss.contract import Term, TermStat, Want
from fastloss.reference_terms import RAW
from fastloss.term_statistics import exchanged, exchanged_stats, teacher_coefficients, term_coefficients

N, V = 5, 23
ALL = int(Want.ENTROPY | Want.SUM | Want.SUMSQ | Want.TEACHER | Want.TEACHER_MEAN | Want.SCORE_MEAN | Want.SUBSET)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(q, p) of log-probabilities, one number a row."""
    return F.kl_div(p, q, reduction="none", log_target=True).sum(-1)


def log_mixture(p: Tensor, q: Tensor, beta: float) -> Tensor:
    return (beta * q.exp() + (1 - beta) * p.exp()).log()


def function(term: Term, z: Tensor, t: Tensor, warm: Tensor, a: float, b: float, beta: float) -> Tensor:
    """The sum of f over the columns, from PyTorch's losses."""
    p, q = (z / warm[:, None]).log_softmax(-1), (t / warm[:, None]).log_softmax(-1)
    if term == Term.KL:
        return a * kl(p, q) + b * kl(q, p)
    if term == Term.MIXTURE:
        m = log_mixture(p, q, beta)
        return a * kl(m, q) + b * kl(m, p)
    if term == Term.TOTAL_VARIATION:
        return F.l1_loss(p.exp(), q.exp(), reduction="none").sum(-1) / 2
    if term == Term.LOG_COSH:
        return torch.cosh((z - t) / warm[:, None] / 2).log().sum(-1)
    target = torch.sigmoid(t / warm[:, None]) if term == Term.BCE_LOGITS else t
    return F.binary_cross_entropy_with_logits(z / warm[:, None], target, reduction="none").sum(-1)


def statistics(z: Tensor, t: Tensor, listed: Tensor, subset: Tensor, warm: Tensor) -> dict[int, Tensor]:
    """Every statistic but the term, maxima as constants."""
    top, teacher_top = z.detach().amax(-1), t.detach().amax(-1)
    rest = torch.ones_like(z, dtype=torch.bool).scatter(1, listed, False)
    p, q = (z / warm[:, None]).softmax(-1), (t / warm[:, None]).softmax(-1)
    gap, teacher_gap = z - top[:, None], t - teacher_top[:, None]
    rest_top = z.detach().masked_fill(~rest, -torch.inf).amax(-1)
    subset_top = z.detach()[:, subset].amax(-1)
    return {
        TermStat.REST_MAX: rest_top,
        TermStat.REST_LOGSUM: torch.logsumexp(z.masked_fill(~rest, -torch.inf), -1) - rest_top,
        TermStat.MAX: top,
        TermStat.LOGSUM: torch.logsumexp(z / warm[:, None], -1) - top / warm,
        TermStat.MEAN: (p * gap).sum(-1),
        TermStat.SUM: gap.sum(-1),
        TermStat.SUMSQ: gap.square().sum(-1),
        TermStat.TEACHER_MAX: teacher_top,
        TermStat.TEACHER_LOGSUM: torch.logsumexp(t / warm[:, None], -1) - teacher_top / warm,
        TermStat.TEACHER_MEAN: (p * teacher_gap).sum(-1),
        TermStat.SCORE_MEAN: (q * gap).sum(-1),
        TermStat.TEACHER_OWN_MEAN: (q * teacher_gap).sum(-1),
        TermStat.SUBSET_MAX: subset_top,
        TermStat.SUBSET_LOGSUM: torch.logsumexp(z[:, subset], -1) - subset_top,
        **{TermStat.LISTED + k: z.gather(1, listed)[:, k] for k in range(listed.shape[1])},
    }


@pytest.mark.parametrize("softcap, scale", [(0.0, 1.0), (4.0, -0.7)])
@pytest.mark.parametrize(
    "term, a, b, beta",
    [(Term.KL, 1.0, 0.0, 0.0), (Term.KL, 0.3, 0.9, 0.0), (Term.MIXTURE, 0.4, 0.6, 0.4), (Term.MIXTURE, 1.0, 0.2, 0.3),
     (Term.TOTAL_VARIATION, 0.0, 0.0, 0.0), (Term.LOG_COSH, 0.0, 0.0, 0.0), (Term.BCE_LOGITS, 0.0, 0.0, 0.0),
     (Term.BCE, 0.0, 0.0, 0.0)],
)  # fmt: skip
def test_statistics_and_gradients(term: Term, a: float, b: float, beta: float, softcap: float, scale: float) -> None:
    x, t = torch.randn(N, V, dtype=torch.float64) * 2, torch.randn(N, V, dtype=torch.float64) * 2
    t = t.sigmoid() if term == Term.BCE else t
    x.requires_grad_(), t.requires_grad_()
    warm, subset = torch.rand(N, dtype=torch.float64) + 0.5, torch.rand(V) < 0.5
    listed = torch.stack([torch.randperm(V)[:2] for _ in range(N)])
    want = ALL | int(Want.TERM)
    tail: tuple[Any, ...] = (-100, want, scale, softcap, int(term), a, b, beta)
    got, _ = reference_terms.row_terms(x.detach(), listed, t.detach(), None, subset, warm, *tail)

    z = softcap * torch.tanh(scale * x / softcap) if softcap else scale * x
    expected = statistics(z, t, listed, subset, warm)
    expected[TermStat.TERM] = function(term, z, t, warm, a, b, beta)
    for stat, number in expected.items():
        torch.testing.assert_close(
            got[stat], number.detach(), rtol=1e-12, atol=1e-12, msg=lambda m, s=stat: f"{s}: {m}"
        )

    maxima = (TermStat.REST_MAX, TermStat.MAX, TermStat.TEACHER_MAX, TermStat.SUBSET_MAX)
    grad = torch.zeros_like(got)
    for stat in expected:
        if stat not in maxima:
            grad[stat] = torch.randn(N, dtype=torch.float64)
    has_teacher_gradient = term not in (Term.BCE_LOGITS, Term.BCE)
    loss = sum((grad[stat] * number).sum() for stat, number in expected.items() if stat not in maxima)
    dx, dt = torch.autograd.grad(loss, (x, t))  # type: ignore[arg-type]
    coef = term_coefficients(grad, None, got, warm, want, int(term))
    ours = reference_terms.row_terms_backward(
        coef, got, torch.empty(0, dtype=torch.int64), x.detach(), listed, t.detach(), None, subset, warm, *tail
    )
    assert (ours - dx).norm() <= 1e-10 * dx.norm()
    if has_teacher_gradient and not softcap and scale == 1:
        swapped = exchanged(int(term), a, b, beta)
        swapped_want = (want & int(Want.TERM)) | int(Want.ENTROPY | Want.TEACHER_MEAN | Want.SCORE_MEAN)
        dt_ours = reference_terms.row_terms_backward(
            teacher_coefficients(grad, got, warm, want, int(term)), exchanged_stats(got),
            torch.empty(0, dtype=torch.int64), t.detach(), None, x.detach(), None, None, warm, -100, swapped_want,
            1.0, 0.0, *swapped,
        )  # fmt: skip
        assert (dt_ours - dt).norm() <= 1e-10 * dt.norm()


def test_generated_probabilities() -> None:
    """HL-Gauss from the distribution function of torch.distributions, in the middle where it keeps its digits."""
    low, width, sigma = -2.0, 0.25, 0.2
    value = torch.tensor([-1.0, 0.1, 1.9, 7.0], dtype=torch.float64)
    normal = torch.distributions.Normal(value.clamp(low, low + width * 16)[:, None], sigma)
    cdf = normal.cdf(low + width * torch.arange(17, dtype=torch.float64))
    q, log_denominator = reference_terms.gauss_probabilities(value, 16, low, width, sigma)
    expected = cdf.diff(dim=-1) / (cdf[:, -1:] - cdf[:, :1])
    torch.testing.assert_close(q, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(log_denominator, (cdf[:, -1] - cdf[:, 0]).log(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("term", [t for t in Term if t and t not in RAW])
def test_slopes_are_derivatives(term: Term) -> None:
    """f_a and f_b against autograd of f, up to the multiple of p or q that cancels in the gradient of the scores."""
    a, b = (torch.randn(N, V, dtype=torch.float64).log_softmax(-1).requires_grad_() for _ in range(2))
    numbers = (0.4, 0.8, 0.3)
    f = reference_terms.term_function(term, a, b, b, numbers).sum()
    for ours, theirs in zip(
        reference_terms._slopes(term, a, b, b, numbers), torch.autograd.grad(f, (a, b)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
