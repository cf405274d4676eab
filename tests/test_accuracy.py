"""Gradients are the product: never less accurate than torch, and right where p of the target is close to 1."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from tolerance import check_close, check_gradient


def confident_logits(n: int, v: int, offset: float, p: float | None) -> tuple[Tensor, Tensor]:
    """float32 logits; with p, the target's probability is p."""
    z, y = torch.randn(n, v) * 2, torch.randint(0, v, (n,))
    if p is not None:
        others = z.scatter(1, y[:, None], -torch.inf)
        z.scatter_(1, y[:, None], (others.logsumexp(1) + torch.tensor(p / (1 - p)).log())[:, None])
    return z + offset, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [None, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("offset", [0.0, 50.0, 1e3, 1e4])
def test_never_less_accurate_than_torch(offset: float, p: float | None, dtype: torch.dtype) -> None:
    z, y = confident_logits(32, 1009, offset, p)
    z = z.to(dtype)
    cotangent = torch.randn(32).to(dtype)
    results = []
    for f, leaf in ((fastloss.cross_entropy, z), (F.cross_entropy, z), (by_margin, z.double())):
        leaf = leaf.clone().requires_grad_()
        mean, rows = f(leaf, y), f(leaf, y, reduction="none")
        (g_mean,) = torch.autograd.grad(mean, leaf, retain_graph=True)
        (g_rows,) = torch.autograd.grad(rows, leaf, cotangent.to(rows.dtype))
        results.append((rows.detach(), g_mean, g_rows))
    # The margin d has the rounding of its own size, up to 9: that of the loss is as many units.
    check_close(results[0][0], results[1][0], results[2][0], dtype, k=16)
    for i in (1, 2):
        check_gradient(results[0][i], results[1][i], results[2][i], dtype, k=8)


def by_margin(z: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """The truth: torch's own float64 loses 1 - p from p = 1 - 1e-16 on."""
    d = z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).logsumexp(1)
    rows = F.softplus(-d)
    return rows if reduction == "none" else rows.mean()


@pytest.mark.parametrize("d, gradient", [(17.0, -4.1399377e-08), (20.0, -2.0611537e-09), (30.0, -9.3576230e-14)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_margin_form_keeps_confident_gradients(backend: str, reduction: str, d: float, gradient: float) -> None:
    """p - 1 in float32 gives 0 from d = 17 on; -sigmoid(-d) does not."""
    z = torch.tensor([[d, 0.0, -torch.inf]], requires_grad=True)
    with fastloss.use_backend(backend):
        loss = fastloss.cross_entropy(z, torch.tensor([0]), reduction=reduction)
        (g,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(g[0, 0].item(), gradient, rtol=1e-5, atol=0)
    torch.testing.assert_close(g[0, 1].item(), -gradient, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.sum().item(), -gradient, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(70, 64, 2003), (33, 50, 777), (200, 96, 1024)])
def test_linear_is_never_less_accurate_than_torch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Peaked logits (Zipf targets, trained-like scale), against the composition in the same dtype."""
    n, d, v = shape
    y = (torch.distributions.Exponential(1.0).sample((n,)) * v / 8).long().clamp(max=v - 1)
    w = torch.randn(v, d) * d**-0.5
    x = torch.randn(n, d) * 2 + 6 * w[y]
    x, w = x.to(dtype), w.to(dtype)
    results = []
    for f, wide in ((fastloss.linear_cross_entropy, None), (_composed, None), (_composed, torch.float64)):
        a, b = (t.to(wide or dtype).clone().requires_grad_() for t in (x, w))
        loss = f(a, b, y)
        results.append((loss.detach(), *torch.autograd.grad(loss, (a, b))))
    for i, check in enumerate((check_close, check_gradient, check_gradient)):
        check(results[0][i], results[1][i], results[2][i], dtype, k=16)  # GEMMs sum in another order


def _composed(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y)
