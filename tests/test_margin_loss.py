"""Losses of the margin with their gradient made in the forward: the same as by way of statistics, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss import losses
from fastloss.losses import catalogue
from fastloss.margin_slopes import _SLOPES

OTHERS: dict[Any, list[dict[str, Any]]] = {
    losses.comp_sum: [{"tau": 0.5}, {"tau": 1.3}, {"tau": 2.5}],
    losses.focal: [{"gamma": 0.0}, {"gamma": 0.5}],
    losses.pass_at_n: [{"n": 1}, {"n": 256}, {"n": 4096}],
    losses.ldr_kl: [{"lam": 10.0, "margin": 0.1}, {"lam": 0.1, "margin": 1.0}],
    losses.truncated_generalized_cross_entropy: [{"q": 0.7, "k": 0.01}],
    losses.mean_absolute_error: [{"factor": 2.0}],
    losses.symmetric_cross_entropy: [{"balance": 0.9, "A": 1.0}],
}
CASES = [(loss, given) for loss in _SLOPES for given in [{}, *OTHERS.get(loss, [])]]
NAMES = [f"{loss.__name__} {given}" for loss, given in CASES]


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(9, 37, generator=generator) * 4).to(dtype)
    y = torch.randint(0, 37, (9,), generator=generator)
    y[4] = -100
    return z, y


def close(got: Tensor, want: Tensor, dtype: torch.dtype, scale: float = 0.0) -> None:
    info = torch.finfo(dtype)  # what float16 cannot hold is infinite there
    got, want = (t.detach().double().clamp(info.min, info.max) for t in (got, want))
    scale = max(scale, float(want.abs().max()))
    assert (got - want).abs().max() <= 16 * info.eps * scale + torch.finfo(torch.float32).tiny


def scale_of(given: dict[str, Any]) -> float:
    """LDR-KL's value is a difference from lam log V."""
    return given.get("lam", 0.0) * math.log(37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_logits(case: tuple[Any, dict[str, Any]], dtype: torch.dtype) -> None:
    loss, given = case
    z, y = rows(dtype)
    z64 = z.double().requires_grad_()
    want = fastloss.row_loss(z64, y, loss, logit_scale=0.5, **given)
    (true,) = torch.autograd.grad(want, z64)
    z.requires_grad_()
    ours = fastloss.row_loss(z, y, loss, logit_scale=0.5, **given)
    assert type(ours.grad_fn).__name__ == "MarginLossBackward"
    close(ours, want, torch.float32, scale_of(given))
    (again,) = torch.autograd.grad(ours, z, retain_graph=True)
    (got,) = torch.autograd.grad(ours, z, torch.tensor(3.0), retain_graph=True)
    close(again, true, dtype)
    close(got, 3 * true, dtype)
    (first,) = torch.autograd.grad(ours, z)
    assert torch.equal(first, again) and (first[4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_linear_head(case: tuple[Any, dict[str, Any]], dtype: torch.dtype) -> None:
    loss, given = case
    _, y = rows(dtype)
    generator = torch.Generator().manual_seed(1)
    shapes = ((9, 16), (37, 16), (37,))
    operands = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    doubles = [t.detach().double().requires_grad_() for t in operands]
    x, w, b = doubles
    want = fastloss.linear_row_loss(x, w, y, loss, linear_bias=b, reduction="sum", **given)
    true = torch.autograd.grad(want, doubles)
    x, w, b = operands
    ours = fastloss.linear_row_loss(x, w, y, loss, linear_bias=b, reduction="sum", **given)
    close(ours, want, torch.float32 if dtype == torch.float32 else torch.bfloat16, 9 * scale_of(given))
    for upstream in (1.0, 3.0):
        grads = torch.autograd.grad(ours, operands, torch.tensor(upstream), retain_graph=True)
        for got, t in zip(grads, true, strict=True):
            close(got, upstream * t, dtype)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_extreme_margins(case: tuple[Any, dict[str, Any]]) -> None:
    """Margins of +-120, a target that is the only class, all others -inf: finite, and what the statistics say."""
    loss, given = case
    z = torch.zeros(5, 7)
    z[0, 0], z[1, 0], z[2, 0], z[3, 1:] = 120.0, -120.0, 30.0, float("-inf")
    y = torch.zeros(5, dtype=torch.int64)
    z64 = z.double().requires_grad_()
    value = fastloss.row_loss(z64, y, loss, reduction="none", **given)
    (true,) = torch.autograd.grad(value[:3].sum(), z64)
    z.requires_grad_()
    for i in range(5):
        if not value[i].isfinite():
            continue
        ours = fastloss.row_loss(z[i : i + 1], y[:1], loss, **given)
        (g,) = torch.autograd.grad(ours, z)
        assert ours.isfinite() and g.isfinite().all(), i
        if i < 3 and true[i].abs().max() < 1e30:
            close(g[i], true[i], torch.float32)


def test_second_derivatives_and_refusals() -> None:
    z, y = rows(torch.float32)
    z.requires_grad_()
    (g,) = torch.autograd.grad(fastloss.row_loss(z, y, losses.focal), z, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), z)
    z64 = z.detach().double().requires_grad_()
    (g64,) = torch.autograd.grad(fastloss.row_loss(z64, y, losses.focal), z64, create_graph=True)
    (true,) = torch.autograd.grad(g64.square().sum(), z64)
    close(h, true, torch.float32, 64 * float(true.abs().max()))
    for wrong in (37, -1):
        with pytest.raises(IndexError):
            fastloss.row_loss(z, torch.full((9,), wrong), losses.focal)
    with pytest.raises(ValueError, match="gamma"):
        fastloss.row_loss(z, y, losses.focal, gamma=-1.0)
    with pytest.raises(TypeError, match="gamm"):
        fastloss.row_loss(z, y, losses.focal, gamm=1.0)
    with pytest.raises(ValueError, match="reduction"):
        fastloss.row_loss(z, y, losses.focal, reduction="avg")


def test_where_it_is_not_taken() -> None:
    z, y = rows(torch.float32)
    z.requires_grad_()
    want = F.cross_entropy(z, y)
    for arguments in ({}, {"stats": "argmax"}, {"column_weight": torch.ones(37)}):
        torch.testing.assert_close(fastloss.row_loss(z, y, losses.logistic, **arguments), want)
    for name in ("reference", "cpp"):
        with fastloss.use_backend(name):
            loss = fastloss.row_loss(z, y, losses.logistic)
        assert (type(loss.grad_fn).__name__ == "MarginLossBackward") == (name == "cpp")
        torch.testing.assert_close(loss, want)
    compiled = torch.compile(lambda z: fastloss.row_loss(z, y, losses.focal), fullgraph=True)
    torch.testing.assert_close(compiled(z), fastloss.row_loss(z, y, losses.focal))
    torch.testing.assert_close(
        torch.func.grad(lambda z: fastloss.row_loss(z, y, losses.focal))(z),
        torch.autograd.grad(fastloss.row_loss(z, y, losses.focal), z)[0],
    )


def test_every_slope_belongs_to_the_catalogue() -> None:
    assert all(catalogue.find(loss) is not None for loss in _SLOPES)
