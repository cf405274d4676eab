"""wpc_loss: value, gradients, and gradients of gradients, through the pairs and through the critic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dense_losses import check_same, embeddings
from fastloss.contrastive import gradient_penalty, wpc_loss

BATCH = 6
SHARE = torch.rand(BATCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PERMUTATION = torch.tensor([2, 0, 1, 5, 3, 4])


def critics(w, v):
    return (lambda x: torch.tanh(x @ w)), (lambda y: torch.tanh(y @ v))


def ours(x, y, w, v):
    return wpc_loss(*critics(w, v), x, y, penalty_weight=2.0, share=SHARE, permutation=PERMUTATION)


def dense(x, y, w, v):
    g, h = critics(w, v)
    loss = F.cross_entropy(g(x) @ h(y).t(), torch.arange(BATCH))
    mixed = SHARE[:, None] * y + (1 - SHARE[:, None]) * y[PERMUTATION]
    a, b = g(x.detach()), h(mixed.detach())
    # the gradient of tanh(x w) . b by hand
    in_x, in_y = ((1 - a * a) * b) @ w.t(), ((1 - b * b) * a) @ v.t()
    return loss + 2.0 * (torch.cat((in_x, in_y), 1).norm(dim=1) - 1).square().mean()


def inputs():
    x, y = embeddings(BATCH, 3)
    w, v = embeddings(3, 4, seed=1)
    return x, y, w, v


def test_value_and_gradients():
    check_same(ours, dense, inputs())


def test_gradients_of_gradients():
    """Of the critic's parameters: the penalty's points are constants."""
    x, y, w, v = inputs()
    assert torch.autograd.gradcheck(lambda w, v: ours(x, y, w, v), (w, v))
    assert torch.autograd.gradgradcheck(lambda w, v: ours(x, y, w, v), (w, v))


def test_a_penalty_on_the_gradient_of_info_nce():
    """The gradient of the pairs themselves is differentiated: create_graph goes through the reference."""
    x, y, w, v = inputs()

    def slope(loss):
        (g,) = torch.autograd.grad(loss(x, y, w, v), x, create_graph=True)
        return g.square().sum()

    mine, right = (torch.autograd.grad(slope(f), (y, w, v)) for f in (ours, dense))
    torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)


def test_penalty_of_a_critic_of_ones_own():
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(lambda x: (x * w).sum((1, 2)), x)
    torch.testing.assert_close(penalty, (w.norm() - 1).square())
    assert torch.autograd.grad(penalty, w)[0].abs().sum() > 0
    with pytest.raises(ValueError, match=r"critic must return \[5\]"):
        gradient_penalty(lambda x: x.sum(), x)


def test_bad_input():
    x, y, w, v = inputs()
    with pytest.raises(ValueError, match="penalty_weight"):
        wpc_loss(*critics(w, v), x, y, penalty_weight=-1.0)
    with pytest.raises(ValueError, match="one batch"):
        wpc_loss(*critics(w, v), x, y[:2], penalty_weight=1.0)
    with pytest.raises(ValueError, match="share and permutation"):
        wpc_loss(*critics(w, v), x, y, penalty_weight=1.0, share=SHARE[:2])
    assert wpc_loss(*critics(w, v), x, y, penalty_weight=1.0, reduction="sum").isfinite()
