"""Dual heads, aspects and boundaries against the same losses on logits that are stored."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_dual_head() -> None:
    x, t, y = rand(5, 4).requires_grad_(), rand(5, 7, seed=1), torch.tensor([0, 6, 3, 3, 1])
    module = fastloss.nn.DualHeadDistillationLoss(4, 7, alpha=0.5, dtype=torch.float64)
    soft = torch.cosh((module.auxiliary(x) - t) / 4).log().sum(-1).mean() * 4
    want = F.cross_entropy(module.main(x), y) + 0.5 * soft
    ours = module(x, y, t)
    torch.testing.assert_close(ours, want)
    parameters = (x, *module.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_multi_aspect() -> None:
    x, w, y = rand(5, 4).requires_grad_(), rand(9, 4, seed=1).requires_grad_(), torch.tensor([0, 5, 3, 3, 1])
    b, aspects = rand(9, seed=2), rand(5, 3, seed=3).sigmoid()
    z = x @ w.T + b
    binary = F.binary_cross_entropy_with_logits(z[:, 6:], aspects, reduction="none").sum(-1).mean()
    want = F.cross_entropy(z[:, :6], y) + 0.7 * binary
    ours = fastloss.multi_aspect_distillation(x, w, y, aspects, alpha=0.7, linear_bias=b)
    torch.testing.assert_close(ours, want)
    for got, true in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(want, (x, w)), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="no room"):
        fastloss.multi_aspect_distillation(x, w[:3], y, aspects)


@pytest.mark.parametrize("empty", [False, True])
def test_boundary(empty: bool) -> None:
    z, t = rand(2, 3, 4, 5).requires_grad_(), rand(2, 3, 4, 5, seed=1)
    boundary = torch.zeros(2, 4, 5, dtype=torch.bool) if empty else rand(2, 4, 5, seed=2) > 0.3
    T = 2.0
    edge, count, body, maps = 0.0, 0, 0.0, 0
    for b in range(2):
        for i, j in boundary[b].nonzero().tolist():
            p, q = (F.log_softmax(a[b, :, i, j] / T, 0) for a in (z, t))
            edge, count = edge + T * T * (q.exp() * (q - p)).sum(), count + 1
        for c in range(3):
            p, q = (F.log_softmax(a[b, c][~boundary[b]] / T, 0) for a in (z, t))
            body, maps = body + T * T * (q.exp() * (q - p)).sum(), maps + 1
    want = 0.5 * edge / max(1, count) + 2 * body / maps
    ours = fastloss.boundary_distillation(z, t, boundary, edge=0.5, body=2.0, temperature=T)
    torch.testing.assert_close(ours, want)
    (got,), (true,) = torch.autograd.grad(ours, z), torch.autograd.grad(want, z)
    torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)
