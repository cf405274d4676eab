"""A linear head with a teacher, listed columns or a subset: the same as on logits that are stored, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss import TeacherHead, losses, terms

N, D, V = 7, 4, 11
TARGET = torch.tensor([0, 10, 3, -100, 5, 5, 9])


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, TeacherHead, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    x, w, b = (rand(*shape).requires_grad_() for shape in ((N, D), (V, D), (V,)))
    teacher = TeacherHead(rand(N, 6), rand(V, 6), rand(V), 1.5, 30.0)
    z = 1.5 * F.linear(*(t.double() for t in teacher[:3]))
    return x, w, b, teacher, 30 * torch.tanh(z / 30)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("separable", "reduction"), [(None, "mean"), (None, "sum"), (False, "mean"), (False, "sum"), (False, "none")]
)
@pytest.mark.parametrize("limit", [None, 2 * V * 8])
def test_teacher_head(dtype: torch.dtype, separable: bool | None, limit: int | None, reduction: str) -> None:
    x, w, b, teacher, t = head(dtype)
    arguments: dict[str, Any] = {"temperature": 2.0, "reduction": reduction}
    loss = losses.knowledge_distillation
    ours = fastloss.linear_row_loss(
        x, w, TARGET, loss, linear_bias=b, teacher=teacher, separable=separable, max_extra_bytes=limit, **arguments
    )
    z = F.linear(x.double(), w.double(), b.double())
    want = fastloss.row_loss(z, TARGET, loss, teacher=t, **arguments)
    got, true = (torch.autograd.grad(v.sum(), (x, w, b)) for v in (ours, want))
    eps = 8 * torch.finfo(dtype).eps
    assert (ours.double() - want).abs().max() <= eps * want.abs().max()
    for a, e in zip(got, true, strict=True):
        assert a.dtype == dtype and (a.double() - e.double()).abs().max() <= eps * e.double().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("limit", [None, 2 * 2 * V * 4])
@pytest.mark.parametrize("loss", [losses.forward_kl, losses.reverse_kl, losses.jensen_shannon, losses.skewed_kl])
def test_distillation_without_target_or_with_one_that_it_does_not_read(
    loss: Any, limit: int | None, dtype: torch.dtype
) -> None:
    """The gradient made right after the statistics, chunk by chunk; the backward scales it, twice if the graph is kept."""
    x, w, b, teacher, t = head(dtype)
    for target in (None, TARGET):
        ours = fastloss.linear_row_loss(
            x, w, target, loss, linear_bias=b, teacher=teacher, temperature=2.0, max_extra_bytes=limit
        )
        z = F.linear(x.double(), w.double(), b.double())
        want = fastloss.row_loss(z, target, loss, teacher=t, temperature=2.0)
        eps = 8 * max(torch.finfo(dtype).eps, 1e-6)
        assert (ours.double() - want).abs() <= eps * want.abs()
        true = torch.autograd.grad(want, (x, w, b))
        for upstream in (3.0, 1.0, 1.0):
            got = torch.autograd.grad(ours * upstream, (x, w, b), retain_graph=True)
            for a, e in zip(got, true, strict=True):
                e = e.double() * upstream
                assert a.dtype == dtype and (a.double() - e).abs().max() <= eps * e.abs().max()
        got = torch.autograd.grad(ours, (x, w, b))  # the graph goes, and what it kept may be handed out
        for a, e in zip(got, true, strict=True):
            assert (a.double() - e.double()).abs().max() <= eps * e.double().abs().max()


def test_second_derivatives_and_transforms() -> None:
    x, w, _, teacher, _ = head()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return fastloss.linear_row_loss(x, w, TARGET, losses.jensen_shannon, teacher=teacher)

    assert torch.autograd.gradcheck(loss, (x, w))
    assert torch.autograd.gradgradcheck(loss, (x, w), fast_mode=True)
    (want,) = torch.autograd.grad(loss(x, w), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach(), w.detach()), want)
    compiled = torch.compile(loss, fullgraph=True)
    (got,) = torch.autograd.grad(compiled(x, w), x)
    torch.testing.assert_close(got, want)


def test_other_statistics_of_a_head() -> None:
    x, w, b, _, t = head()
    z = F.linear(x, w, b)
    listed = torch.stack((torch.arange(N), torch.arange(N) + 3), -1)
    subset = torch.arange(V) < 4
    generated = terms.HLGauss(torch.linspace(-2, 2, N), -2.0, 2.0, 0.4)
    temperature = torch.linspace(1, 2, N, dtype=torch.float64, requires_grad=True)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"listed": listed}, "listed_logp"),
        ({"subset": subset}, "subset_logp"),
        ({"generated": generated, "stats": "score_mean"}, "teacher_nll"),
        ({"temperature": temperature}, "tempered_lse"),
        ({"teacher": t.requires_grad_(), "stats": ("teacher_mean", "entropy")}, "teacher_mean"),
    ]
    for arguments, name in cases:
        ours = getattr(fastloss.linear_row_stats(x, w, TARGET, linear_bias=b, **arguments), name)
        want = getattr(fastloss.row_stats(z, TARGET, **arguments), name)
        torch.testing.assert_close(ours, want)
        inputs = [x, w, b, *(a for a in arguments.values() if isinstance(a, Tensor) and a.requires_grad)]
        for a, e in zip(
            torch.autograd.grad(ours.sum(), inputs),
            torch.autograd.grad(want.sum(), inputs, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


def test_refusals() -> None:
    x, w, _, teacher, t = head()
    with pytest.raises(ValueError, match="detach its input"):
        fastloss.linear_row_stats(x, w, teacher=teacher._replace(weight=teacher.weight.clone().requires_grad_()))
    with pytest.raises(ValueError, match="the teacher's input must be"):
        fastloss.linear_row_stats(x, w, teacher=teacher._replace(input=teacher.input[1:]))
    with pytest.raises(ValueError, match="grad_weight goes with"):
        fastloss.linear_row_stats(x.float(), w.float(), teacher=t, grad_weight=torch.zeros(V, D))
    with pytest.raises(TypeError, match="unexpected keyword"):
        fastloss.linear_row_loss(x, w, TARGET, losses.forward_kl, teacher=t, temprature=2.0)
