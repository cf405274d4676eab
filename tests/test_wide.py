"""Statistics of rows with a teacher, listed columns, a subset or generated targets, against torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss import terms

N, V = 6, 11
TARGET = torch.tensor([3, 0, -100, 10, 7, 7])
LISTED = torch.tensor([[1, 2], [3, 3], [4, -1], [0, 8], [5, 6], [7, -5]])


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(N, V, dtype=torch.float64, generator=generator) * 3
    t = torch.randn(N, V, dtype=torch.float64, generator=generator) * 2
    return z.requires_grad_(), t.requires_grad_()


def agree(ours: Tensor, want: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-12)
    w = torch.randn_like(ours)
    for got, true in zip(
        torch.autograd.grad((ours * w).sum(), inputs, retain_graph=True),
        torch.autograd.grad((want * w).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        assert (got - true).abs().max() <= 1e-10 * true.abs().max()


def counted(x: Tensor) -> Tensor:
    return torch.where(TARGET != -100, x, 0.0)


def mixture(log_p: Tensor, log_q: Tensor, first: float, second: float, beta: float) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    m = beta * q + (1 - beta) * p
    return first * (q * (q / m).log()).sum(-1) + second * (p * (p / m).log()).sum(-1)


TERMS: dict[str, tuple[terms.RowTerm, Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]]] = {
    "forward kl": (
        terms.kl(),
        lambda lp, lq, z, t, T: F.kl_div(lp, lq, log_target=True, reduction="none").sum(-1),
    ),
    "reverse kl": (
        terms.kl(0, 1),
        lambda lp, lq, z, t, T: F.kl_div(lq, lp, log_target=True, reduction="none").sum(-1),
    ),
    "both": (terms.kl(0.3, 0.7), lambda lp, lq, z, t, T: ((0.3 * lq.exp() - 0.7 * lp.exp()) * (lq - lp)).sum(-1)),
    "jensen-shannon": (terms.jensen_shannon(0.3), lambda lp, lq, z, t, T: mixture(lp, lq, 0.3, 0.7, 0.3)),
    "skewed": (terms.mixture(1, 0, 0.1), lambda lp, lq, z, t, T: mixture(lp, lq, 1, 0, 0.1)),
    "mixture at 0": (terms.mixture(2, 5, 0), lambda lp, lq, z, t, T: 2 * (lq.exp() * (lq - lp)).sum(-1)),
    "total variation": (terms.total_variation(), lambda lp, lq, z, t, T: (lp.exp() - lq.exp()).abs().sum(-1) / 2),
    "log cosh": (terms.log_cosh(), lambda lp, lq, z, t, T: torch.cosh((z - t) / (2 * T)).log().sum(-1)),
}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", TERMS)
def test_terms(name: str, temperature: float) -> None:
    z, t = rows()
    term, formula = TERMS[name]
    ours = fastloss.row_stats(z, TARGET, teacher=t, term=term, temperature=temperature).term
    log_p, log_q = (F.log_softmax(x / temperature, -1) for x in (z, t))
    agree(ours, counted(formula(log_p, log_q, z, t, temperature)), (z, t))


@pytest.mark.parametrize("logits", [True, False])
def test_binary_cross_entropy(logits: bool) -> None:
    z, t = (x.detach() for x in rows())
    z.requires_grad_()
    t = t if logits else t.sigmoid()
    ours = fastloss.row_stats(z, TARGET, teacher=t, term=terms.binary_cross_entropy(logits=logits)).term
    want = F.binary_cross_entropy_with_logits(z, t.sigmoid() if logits else t, reduction="none").sum(-1)
    agree(ours, counted(want), (z,))
    with pytest.raises(ValueError, match="the gradient of the teacher"):
        fastloss.row_stats(z, teacher=t.requires_grad_(), term=terms.binary_cross_entropy())


def test_teacher_means() -> None:
    z, t = rows()
    s = fastloss.row_stats(
        z, TARGET, teacher=t, temperature=2.0, stats=("teacher_lse", "teacher_mean", "score_mean", "entropy")
    )
    log_p, log_q = (F.log_softmax(x / 2, -1) for x in (z, t))
    p, q = log_p.exp(), log_q.exp()
    agree(s.teacher_mean, counted((p * t).sum(-1)), (z, t))
    agree(s.score_mean, counted((q * z).sum(-1)), (z, t))
    agree(s.teacher_nll, counted(-(q * log_p).sum(-1)), (z, t))
    agree(s.reverse_nll, counted(-(p * log_q).sum(-1)), (z, t))
    agree(s.teacher_entropy, counted(-(q * log_q).sum(-1)), (t,))
    agree(s.entropy, counted(-(p * log_p).sum(-1)), (z,))
    agree(s.mean_logit, counted((p * z).sum(-1)), (z,))
    agree(s.teacher_lse, counted((t / 2).logsumexp(-1)), (t,))
    agree(s.tempered_lse, counted((z / 2).logsumexp(-1)), (z,))
    agree(s.lse, counted(z.logsumexp(-1)), (z,))
    agree(s.logp, counted(-F.cross_entropy(z, TARGET.clamp(min=0), reduction="none")), (z,))


def test_listed_columns() -> None:
    z, _ = rows()
    s = fastloss.row_stats(z, TARGET, listed=LISTED, stats=("sum", "sumsq"))
    ids = torch.cat((TARGET[:, None], LISTED), 1)
    present = ids >= 0
    true = z.gather(1, ids.clamp(min=0))
    rest = z.masked_fill(torch.zeros(N, V).scatter_add(1, ids.clamp(min=0), present.float()) > 0, -math.inf)
    agree(counted(s.rest_lse), counted(rest.logsumexp(-1)), (z,))
    agree(s.lse, counted(z.logsumexp(-1)), (z,))
    agree(s.logp, counted(-F.cross_entropy(z, TARGET.clamp(min=0), reduction="none")), (z,))
    agree(s.sum, counted(z.sum(-1)), (z,))
    agree(s.nll_sum, counted((z.logsumexp(-1, keepdim=True) - z).sum(-1)), (z,))
    agree(s.sumsq, counted((z * z).sum(-1)), (z,))
    agree(s.variance, counted(z.var(-1, unbiased=False)), (z,))
    picked = torch.where(present & (TARGET != -100)[:, None], s.listed_logits, 0.0)
    agree(picked, torch.where(present & (TARGET != -100)[:, None], true, 0.0), (z,))


def test_subset() -> None:
    z, _ = rows()
    subset = torch.arange(V) % 3 == 0
    s = fastloss.row_stats(z, TARGET, subset=subset)
    agree(s.subset_lse, counted(z[:, subset].logsumexp(-1)), (z,))
    agree(s.subset_logp, counted(z[:, subset].logsumexp(-1) - z.logsumexp(-1)), (z,))


def test_generated_targets() -> None:
    z, _ = rows()
    values = torch.tensor([-7.0, -0.2, 0.0, 0.31, 0.99, 12.0], dtype=torch.float64)
    s = fastloss.row_stats(z, generated=terms.HLGauss(values, -1.0, 1.0, 0.14), stats="score_mean")
    edges = torch.linspace(-1, 1, V + 1, dtype=torch.float64)
    cdf = torch.special.ndtr((edges - values.clamp(-1, 1)[:, None]) / 0.14)
    q = cdf.diff() / (cdf[:, -1:] - cdf[:, :1])
    agree(s.teacher_nll, -(q * F.log_softmax(z, -1)).sum(-1), (z,))


def test_temperature_has_a_gradient() -> None:
    z, _ = rows()
    temperature = torch.linspace(0.5, 3, N, dtype=torch.float64, requires_grad=True)
    s = fastloss.row_stats(z, TARGET, temperature=temperature)
    agree(s.tempered_lse, counted((z / temperature[:, None]).logsumexp(-1)), (z, temperature))
    one = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    agree(fastloss.row_stats(z, temperature=one).tempered_lse, (z / one).logsumexp(-1), (z, one))


def test_shared_teacher_and_second_derivatives() -> None:
    z, t = (x.detach() for x in rows())
    z.requires_grad_()
    s = fastloss.row_stats(z, TARGET, teacher=t[0], stats="teacher_mean")
    agree(s.teacher_mean, counted((z.softmax(-1) * t[0]).sum(-1)), (z,))

    def loss(z: Tensor, t: Tensor) -> Tensor:
        s = fastloss.row_stats(z, TARGET, teacher=t, term=terms.jensen_shannon(), stats="entropy")
        return s.term + s.entropy - s.logp

    both = (z, t.requires_grad_())
    assert torch.autograd.gradcheck(loss, both)
    assert torch.autograd.gradgradcheck(loss, both, fast_mode=True)


def test_refusals() -> None:
    z, t = (x.detach() for x in rows())
    with pytest.raises(ValueError, match="needs a teacher"):
        fastloss.row_stats(z, TARGET, stats="score_mean")
    with pytest.raises(ValueError, match="teacher must have shape"):
        fastloss.row_stats(z, TARGET, teacher=t[:, 1:])
    with pytest.raises(TypeError, match=r"fastloss\.terms"):
        fastloss.row_stats(z, TARGET, teacher=t, term="kl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="listed must have shape"):
        fastloss.row_stats(z, TARGET, listed=TARGET)
    with pytest.raises(TypeError, match="integer"):
        fastloss.row_stats(z, TARGET, listed=LISTED.float())
    with pytest.raises(ValueError, match="bool mask"):
        fastloss.row_stats(z, TARGET, subset=torch.ones(V))
    with pytest.raises(ValueError, match="class ids as target"):
        fastloss.row_stats(z, t.softmax(-1), teacher=t)
    with pytest.raises(ValueError, match="beta"):
        terms.jensen_shannon(1.0)
    with pytest.raises(ValueError, match="shared by all rows"):
        fastloss.row_stats(z, teacher=t[0].clone().requires_grad_(), stats="teacher_mean")
