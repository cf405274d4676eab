"""The gradient of a trained temperature, for every statistic that depends on it, against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss import losses, terms

N, V, D = 5, 11, 3
TARGET = torch.tensor([3, 0, -100, 10, 7])


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(N, V, dtype=torch.float64, generator=generator)
    t = 2 * torch.randn(N, V, dtype=torch.float64, generator=generator)
    warm = torch.linspace(0.7, 2.5, N, dtype=torch.float64)
    return z.to(dtype).requires_grad_(), t.to(dtype), warm.to(dtype).requires_grad_()


def log_softmax(x: Tensor, warm: Tensor) -> Tensor:
    return F.log_softmax(x / warm[:, None], -1)


STATISTICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "entropy": lambda z, t, T: -(log_softmax(z, T).exp() * log_softmax(z, T)).sum(-1),
    "mean_logit": lambda z, t, T: (log_softmax(z, T).exp() * z).sum(-1),
    "tempered_lse": lambda z, t, T: (z / T[:, None]).logsumexp(-1),
    "teacher_lse": lambda z, t, T: (t / T[:, None]).logsumexp(-1),
    "teacher_mean": lambda z, t, T: (log_softmax(z, T).exp() * t).sum(-1),
    "score_mean": lambda z, t, T: (log_softmax(t, T).exp() * z).sum(-1),
    "teacher_nll": lambda z, t, T: -(log_softmax(t, T).exp() * log_softmax(z, T)).sum(-1),
    "teacher_entropy": lambda z, t, T: -(log_softmax(t, T).exp() * log_softmax(t, T)).sum(-1),
    "term": lambda z, t, T: F.kl_div(log_softmax(z, T), log_softmax(t, T), log_target=True, reduction="none").sum(-1),
}
TEACHER = ("entropy", "teacher_lse", "teacher_mean", "score_mean")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name: str, dtype: torch.dtype) -> None:
    z, t, warm = operands(dtype)
    s = fastloss.row_stats(z, TARGET, teacher=t, term=terms.kl(), stats=TEACHER, temperature=warm)
    exact_z, exact_t, exact_warm = (x.detach().double().requires_grad_() for x in (z, t, warm))
    want = torch.where(TARGET == -100, 0.0, STATISTICS[name](exact_z, exact_t, exact_warm))
    weight = torch.linspace(-1, 2, N, dtype=torch.float64)
    inputs, exact = ((z, warm), (exact_z, exact_warm)) if name != "teacher_lse" else ((warm,), (exact_warm,))
    got = torch.autograd.grad((getattr(s, name) * weight).sum(), inputs, allow_unused=True)
    true = torch.autograd.grad((want * weight).sum(), exact, allow_unused=True)
    for a, b in zip(got, true, strict=True):
        if b is not None and a is not None:
            assert (a - b).abs().max() <= (1e-10 if dtype == torch.float64 else 1e-5) * (b.abs().max() + 1e-3)


def test_the_entropy_alone_and_the_lse_alone() -> None:
    z, _, warm = operands()
    s = fastloss.row_stats(z, stats="entropy", temperature=warm)
    (got,) = torch.autograd.grad(s.entropy.sum(), warm)
    (want,) = torch.autograd.grad(STATISTICS["entropy"](z, z, warm).sum(), warm)
    assert (got - want).abs().max() <= 1e-10
    with pytest.raises(ValueError, match="entropy"):  # it would be there, but without its gradient
        _ = fastloss.row_stats(z, temperature=warm).entropy


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "log_cosh", "binary_distillation"])
def test_losses_of_a_head(name: str) -> None:
    """More rows than are differentiated at a time, a teacher with its own head, and one number for all rows."""
    generator = torch.Generator().manual_seed(1)
    x, w, y = (torch.randn(n, D, dtype=torch.float64, generator=generator) for n in (300, V, V))
    loss = getattr(losses, name)
    warm = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    ours = fastloss.linear_row_loss(x, w, None, loss, teacher=terms.TeacherHead(x, y), temperature=warm)
    (got,) = torch.autograd.grad(ours, warm)
    step = 1e-6
    above, below = (fastloss.row_loss(x @ w.T, None, loss, teacher=x @ y.T, temperature=1.3 + s) for s in (step, -step))
    assert abs(got - (above - below) / (2 * step)) <= 1e-7 * abs(got)


def test_transforms() -> None:
    z, t, warm = (x.detach() for x in operands(torch.float32))

    def loss(z: Tensor, warm: Tensor) -> Tensor:
        return fastloss.row_loss(z, TARGET, losses.knowledge_distillation, teacher=t, temperature=warm)

    inputs = (z.clone().requires_grad_(), warm.clone().requires_grad_())
    want = torch.autograd.grad(loss(*inputs), inputs)
    again = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs), inputs)
    functional = torch.func.grad(loss, argnums=(0, 1))(z, warm)
    for found in (again, compiled, functional):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
