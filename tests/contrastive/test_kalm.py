"""KaLM's focal InfoNCE against the dense formula, and its mixtures of hard negatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from contrastive_checks import agree, cosines, leaves
from fastloss.contrastive import FocalInfoNCELoss, focal_info_nce, info_nce, mix_hard_negatives


def dense(q, k, scale, negatives, gamma=0.5):
    z = scale * torch.cat((cosines(q, k), cosines(q, negatives.flatten(0, 1))), 1)
    nll = F.cross_entropy(z, torch.arange(len(q)), reduction="none")
    return (1 - (-nll).exp()) ** gamma * nll


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_focal_at_all_scales_with_duplicates(scale):
    q, k, negatives = leaves((7, 8), (7, 8), (7, 2, 8))
    with torch.no_grad():
        q[1], k[1] = q[0], k[0]
    ours = focal_info_nce(q, k, 1 / scale, negatives=negatives, reduction="none")
    agree(ours, dense(q, k, scale, negatives), (q, k, negatives))


def test_focal_of_solved_rows_has_no_gradient():
    q = torch.eye(4).requires_grad_()
    loss = focal_info_nce(q, 2 * torch.eye(4) - 1, 0.001)
    assert loss == 0 and torch.autograd.grad(loss, q)[0].abs().max() == 0


def test_module_holds_the_defaults():
    q, k = leaves((7, 8), (7, 8))
    assert torch.equal(FocalInfoNCELoss()(q, k), info_nce(q, k, 1 / 0.02, focal_gamma=0.5))


@pytest.mark.parametrize("mode", ["pair", "list"])
def test_mixed_negatives_are_convex_and_unit(mode):
    negatives = torch.randn(6, 3, 3, dtype=torch.float64).requires_grad_()
    draw = [mix_hard_negatives(negatives, 5, mode, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    mixed = draw[0]
    assert torch.equal(*draw) and mixed.shape == (6, 5, 3)
    torch.testing.assert_close(mixed.norm(dim=2), torch.ones(6, 5, dtype=torch.float64))
    share = torch.linalg.solve(F.normalize(negatives, dim=2).transpose(1, 2), mixed.transpose(1, 2))
    assert (share > -1e-9).all()  # on the cone of the row's own negatives
    assert ((share > 1e-9).sum(1) == (2 if mode == "pair" else 3)).all()
    assert torch.autograd.grad(mixed.sum(), negatives)[0].abs().max() > 0


def test_bad_input():
    q, negatives = torch.randn(4, 8), torch.randn(4, 2, 8)
    for call in (
        lambda: mix_hard_negatives(q, 1),
        lambda: mix_hard_negatives(negatives[:, :1], 1),
        lambda: mix_hard_negatives(negatives, 0),
        lambda: mix_hard_negatives(negatives, 1, "all"),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
