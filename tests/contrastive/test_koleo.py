"""koleo_loss against DINOv2's formula, and InfoNCE with it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dense_losses import check_narrow, check_same, embeddings
from fastloss.contrastive import info_nce_koleo_loss, koleo_loss


def dense_koleo(x, normalize=True):
    x = F.normalize(x, dim=1) if normalize else x
    dots = (x @ x.t()).fill_diagonal_(-2 if normalize else -1e9)
    return -((x - x[dots.argmax(1)]).norm(dim=1) + 1e-8).log()


@pytest.mark.parametrize("batch", [2, 3, 65])
def test_koleo(batch):
    check_same(lambda x: koleo_loss(x, reduction="none"), dense_koleo, embeddings(batch, 8, seed=batch, count=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow(dtype):
    check_narrow(
        koleo_loss,
        lambda x: dense_koleo(x.float() if x.dtype == torch.bfloat16 else x).mean(),
        embeddings(17, 8, count=1),
        dtype,
    )


def test_info_nce_koleo():
    def dense(q, k):
        z = 25.0 * F.normalize(q, dim=1) @ F.normalize(k, dim=1).t()
        return F.cross_entropy(z, torch.arange(len(q))) + 0.1 * dense_koleo(q).mean()

    check_same(info_nce_koleo_loss, dense, embeddings(17, 8))


def test_equal_rows_and_one_row():
    x = torch.ones(3, 4, requires_grad=True)
    loss = koleo_loss(x)
    assert float(loss.detach()) == pytest.approx(-math.log(1e-8), rel=1e-5)
    assert (torch.autograd.grad(loss, x)[0] == 0).all()
    assert float(koleo_loss(x[:1], reduction="mean_valid").detach()) == 0
    with pytest.raises(ValueError, match="eps"):
        koleo_loss(x, eps=0.0)
