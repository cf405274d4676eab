"""Rows with a teacher or listed columns at the edges: ids out of range, long lists, one row, nothing that counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastloss
from fastloss import losses, terms

N, V, D = 6, 11, 4
DTYPES = (torch.float32, torch.float64)


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, t = (3 * torch.randn(N, V, dtype=torch.float64, generator=generator) for _ in range(2))
    return z.to(dtype), t.to(dtype), torch.randint(0, V, (N,), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_negative_target_is_no_absent_column(dtype: torch.dtype) -> None:
    z, t, y = rows(dtype)
    y[1] = -1
    for arguments in ({"teacher": t}, {"listed": y[:, None]}, {"stats": "entropy"}):
        with pytest.raises(IndexError, match="target -1 at row 1"):
            fastloss.row_stats(z, y, **arguments)
    with pytest.raises(IndexError, match="target -1 at row 1"):
        fastloss.linear_row_loss(z, torch.eye(V, dtype=dtype), y, losses.confidence_penalty)
    assert fastloss.row_stats(z, y, teacher=t, ignore_index=-1).logp[1] == 0
    assert fastloss.row_stats(z, listed=y[:, None]).listed_logp[1] == -math.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_centred_target_logit_of_the_largest_column(dtype: torch.dtype) -> None:
    z, t, y = rows(dtype)
    z[:3] = z[:3].scatter_add(1, y[:3, None], torch.full((3, 1), 30.0, dtype=dtype))
    want = z.double().gather(1, y[:, None])[:, 0] - z.double().mean(-1)
    for arguments in ({}, {"teacher": t}, {"listed": y[:, None]}):
        s = fastloss.row_stats(z, y, stats=("sum", "entropy"), **arguments)
        torch.testing.assert_close(s.centred_target_logit.double(), want, rtol=1e-6, atol=1e-5)


def test_long_lists() -> None:
    """Repeated, absent and ignored ids among many; no row needs K x K numbers."""
    generator = torch.Generator().manual_seed(0)
    v, k = 2000, 500
    z = torch.randn(N, v, dtype=torch.float64, generator=generator).requires_grad_()
    listed = torch.randint(-20, v // 2, (N, k), generator=generator)
    y = listed[:, 7].clamp(min=0)
    s = fastloss.row_stats(z, y, listed=listed)
    torch.testing.assert_close(s.lse, z.logsumexp(-1))
    torch.testing.assert_close(s.logp, -F.cross_entropy(z, y, reduction="none"))
    present = torch.zeros(N, v).scatter_add(1, listed.clamp(min=0), (listed >= 0).float()).scatter(1, y[:, None], 1.0)
    torch.testing.assert_close(s.rest_logp, z.masked_fill(present > 0, -math.inf).logsumexp(-1) - z.logsumexp(-1))
    (got,) = torch.autograd.grad(s.logp.sum(), z)
    (want,) = torch.autograd.grad(-F.cross_entropy(z, y, reduction="sum"), z)
    torch.testing.assert_close(got, want)

    with _Largest() as made:
        _ = s.lse, s.margin
    assert made.numbers <= N * (k + 2)


class _Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made inside."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.numbers = max(self.numbers, t.numel() if isinstance(t, Tensor) else 0)
        return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_and_its_teacher(dtype: torch.dtype) -> None:
    z, t, _ = (x[:1] for x in rows(dtype))
    exact = t.double().requires_grad_()
    want = F.kl_div(z.double().log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="sum")
    (true,) = torch.autograd.grad(want, exact)
    for shape in ((1, V), (V,)):
        student, teacher = z.reshape(shape), t.reshape(shape).clone().requires_grad_()
        (got,) = torch.autograd.grad(fastloss.row_loss(student, None, losses.forward_kl, teacher=teacher), teacher)
        torch.testing.assert_close(got.double(), true.reshape(shape), rtol=1e-5, atol=1e-6)


def test_no_gradient_of_the_teacher_is_asked_for_under_no_grad() -> None:
    z, t, _ = rows(torch.float32)
    t.requires_grad_()
    with torch.no_grad():
        shared = fastloss.row_loss(z, None, losses.forward_kl, teacher=t[0])
        binary = fastloss.row_loss(z, None, losses.binary_distillation, teacher=t)
    assert torch.equal(shared, fastloss.row_loss(z, None, losses.forward_kl, teacher=t[0].detach()))
    assert torch.equal(binary, fastloss.row_loss(z, None, losses.binary_distillation, teacher=t.detach()))


@pytest.mark.parametrize("name", ["focal", "brier", "confidence_penalty", "knowledge_distillation"])
def test_the_mean_of_no_rows(name: str) -> None:
    """NaN as in torch, whichever way the gradients are made, and a sum of 0; the gradients are those of torch, 0."""
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    arguments = {"teacher": torch.randn(N, V)} if name == "knowledge_distillation" else {}
    nothing = torch.full((N,), -100)
    for separable in (None, False):
        more = {"separable": separable, **arguments}
        mean = fastloss.linear_row_loss(x, w, nothing, getattr(losses, name), **more)
        assert mean.isnan()
        assert all(not g.any() for g in torch.autograd.grad(mean, (x, w)))
        assert fastloss.linear_row_loss(x, w, nothing, getattr(losses, name), reduction="sum", **more) == 0
    assert fastloss.row_loss(x @ w.T, nothing, getattr(losses, name), **arguments).isnan()


def test_the_smallest_limit_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher's head shares the bytes with the student's: of one byte each gets a row at a time, not all."""
    from fastloss import linear_terms

    seen = []
    counted = linear_terms.chunk_rows
    monkeypatch.setattr(linear_terms, "chunk_rows", lambda x, w, limit: seen.append(counted(x, w, limit)) or seen[-1])
    x, w = torch.randn(N, D), torch.randn(V, D)
    fastloss.linear_row_loss(x, w, None, losses.forward_kl, teacher=terms.TeacherHead(x, w), max_extra_bytes=1)
    assert seen == [1]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "skewed_reverse_kl"])
def test_second_derivatives_of_masked_columns(name: str) -> None:
    """Columns that neither student nor teacher has are as if they were not there."""
    z, t, _ = rows(torch.float64)
    keep = torch.arange(V) % 3 > 0
    found = []
    for columns, mask in ((slice(None), ~keep), (keep, None)):
        student, teacher = (x[:, columns].clone() for x in (z, t))
        if mask is not None:
            student[:, mask] = teacher[:, mask] = -math.inf
        student.requires_grad_()
        loss = fastloss.row_loss(student, None, getattr(losses, name), teacher=teacher)
        (g,) = torch.autograd.grad(loss, student, create_graph=True)
        (h,) = torch.autograd.grad((g**2).sum(), student)
        found.append((g.detach(), h))
    for whole, part in zip(*found, strict=True):
        assert not whole[:, ~keep].any()
        torch.testing.assert_close(whole[:, keep], part)


def test_margins_of_wide_statistics_compile() -> None:
    z, t, y = rows(torch.float32)
    for loss, arguments in ((losses.knowledge_distillation, {"teacher": t}), (losses.confidence_penalty, {})):
        compiled = torch.compile(
            lambda z, loss=loss, arguments=arguments: fastloss.row_loss(z, y, loss, **arguments),
            backend="aot_eager",
            fullgraph=True,
        )
        torch.testing.assert_close(compiled(z), fastloss.row_loss(z, y, loss, **arguments))


def test_the_order_of_a_masked_teacher() -> None:
    _, t, y = rows(torch.float32)
    t[:, ::2] = -math.inf
    others, _ = losses.plackett_luce_order(t, y, V)
    assert torch.equal(torch.cat((y[:, None], others), 1).sort().values, torch.arange(V).expand(N, V))


def test_ldr_kl_refuses_a_temperature_that_is_none() -> None:
    z, _, y = rows(torch.float32)
    for lam in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature must be > 0"):
            fastloss.row_loss(z.requires_grad_(), y, losses.ldr_kl, lam=lam)


def test_a_temperature_is_read_or_refused() -> None:
    z, t, y = rows(torch.float32)
    z.requires_grad_()
    for loss in (losses.focal, losses.normalized_cross_entropy, losses.entropy_bonus):
        with pytest.raises(ValueError, match="reads `temperature`"):
            fastloss.row_loss(z, y, loss, temperature=2.0)
        with pytest.raises(ValueError, match="reads `temperature`"):
            fastloss.linear_row_loss(z, torch.eye(V), y, loss, temperature=2.0)
        assert fastloss.row_loss(z, y, loss, temperature=1.0) == fastloss.row_loss(z, y, loss, temperature=1)
    with pytest.raises(TypeError, match="brier sets temperature"):
        fastloss.row_loss(z, y, losses.brier, temperature=2.0)
    with pytest.raises(TypeError, match="forward_kl sets term"):
        fastloss.row_loss(z, None, losses.forward_kl, teacher=t, term=terms.kl(0, 1))


def test_entropies_take_a_grad_weight() -> None:
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    _, _, y = rows(torch.float32)
    buffer = torch.zeros(V, D)
    fastloss.linear_row_loss(x, w, y, losses.confidence_penalty, grad_weight=buffer).backward()
    (want,) = torch.autograd.grad(fastloss.linear_row_loss(x, w, y, losses.confidence_penalty), w)
    torch.testing.assert_close(buffer, want)


def test_losses_compile_with_dynamic_shapes() -> None:
    """Parameters that have their defaults and a user's function made inside."""
    w = torch.randn(V, D)

    def everything(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        z = x @ w.T
        total = fastloss.row_loss(z, y, losses.knowledge_distillation, teacher=t)
        total = total + fastloss.row_loss(z, y, losses.ldr_kl) + fastloss.row_loss(z, None, losses.tsallis_entropy)
        total = total + fastloss.row_loss(z, y, lambda s, *, a=2.0: -a * s.logp - s.entropy, a=3.0, stats="entropy")
        return total + fastloss.linear_row_loss(x, w, y, losses.symmetric_cross_entropy)

    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (5, 8):
        x, t, y = torch.randn(n, D, requires_grad=True), torch.randn(n, V), torch.randint(0, V, (n,))
        got, want = compiled(x, t, y), everything(x, t, y)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


def test_a_module_owns_the_tensors_it_was_given() -> None:
    weight = torch.rand(7)
    gamma = torch.nn.Parameter(torch.full((4,), 2.0))
    module = fastloss.nn.RowLoss(lambda s, gamma: s.nll**gamma, gamma=gamma, column_weight=weight)
    assert [p is gamma for p in module.parameters()] == [True]
    assert set(module.state_dict()) == {"tensors.gamma", "tensors.column_weight"}
    module(torch.randn(4, 7), torch.tensor([0, 1, 2, 6])).backward()
    assert gamma.grad is not None and (gamma.grad != 0).all()
    assert module.to(torch.float64).arguments["column_weight"].dtype == torch.float64
