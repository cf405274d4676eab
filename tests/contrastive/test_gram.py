"""The Gram forms against the B x B matrices that they do without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dense_losses import check_narrow, check_same, embeddings
from fastloss.contrastive import barlow_twins_loss, cyclip_loss, gor_loss, spectral_contrastive_loss, vicreg_loss


def off(matrix):
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def dense_spectral(q, k):
    s = q @ k.t()
    return -2 * s.diagonal().mean() + off(s).square().mean()


def dense_cyclip(q, k, within=0.25, across=0.25):
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    inside, cross = (q @ q.t() - k @ k.t()).square().sum(), (q @ k.t() - k @ q.t()).square().sum()
    return (within * inside + across * cross) / len(q)


def dense_barlow(q, k, off_diagonal=0.0051, standardize=True):
    if standardize:
        q, k = (F.batch_norm(x, None, None, training=True) for x in (q, k))
    c = q.t() @ k / len(q)
    return (c.diagonal() - 1).square().sum() + off_diagonal * off(c).square().sum()


def dense_vicreg(q, k):
    loss = 25 * F.mse_loss(q, k)
    for x in (q, k):
        loss = loss + 25 * F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean() / 2
        loss = loss + off(torch.cov(x.t())).square().sum() / x.shape[1]
    return loss


def dense_gor(q, k):
    s = off(F.normalize(q, dim=1) @ F.normalize(k, dim=1).t())
    return s.mean().square() + F.relu(s.square().mean() - 1 / q.shape[1])


LOSSES = [
    (spectral_contrastive_loss, dense_spectral),
    (cyclip_loss, dense_cyclip),
    (lambda q, k: cyclip_loss(q, k, in_modal=1.0, cross_modal=0.0), lambda q, k: dense_cyclip(q, k, 1.0, 0.0)),
    (lambda q, k: cyclip_loss(q, k, in_modal=0.0, cross_modal=1.0), lambda q, k: dense_cyclip(q, k, 0.0, 1.0)),
    (barlow_twins_loss, dense_barlow),
    (
        lambda q, k: barlow_twins_loss(q, k, off_diagonal=5e-3, standardize=False, scale=0.025),  # BarLIP
        lambda q, k: 0.025 * dense_barlow(q, k, 5e-3, False),
    ),
    (vicreg_loss, dense_vicreg),
    (gor_loss, dense_gor),
]


@pytest.mark.parametrize("loss", range(len(LOSSES)))
@pytest.mark.parametrize("shape", [(2, 5), (33, 6), (5, 17)])
def test_against_dense(loss, shape):
    check_same(*LOSSES[loss], embeddings(*shape, seed=loss))


@pytest.mark.parametrize("loss", range(len(LOSSES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow(loss, dtype):
    ours, dense = LOSSES[loss]
    # a dense formula in bf16 is worse by far: ours widens, so it is held to the dense formula in float32. M2 - 1 / D of gor is
    # a difference of nearly equal numbers.
    wide = lambda *x: dense(*(t.float() if t.dtype == torch.bfloat16 else t for t in x))  # noqa: E731
    check_narrow(ours, wide, embeddings(33, 6, seed=loss), dtype, k=64.0 if ours is gor_loss else 16.0)


def test_consistency_of_views_that_are_near():
    q = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    k = q + 1e-5 * torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    right = dense_cyclip(q.double(), k.double())
    torch.testing.assert_close(cyclip_loss(q, k).double(), right, rtol=5e-3, atol=0)
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    expanded = (q.t() @ q).square().sum() - 2 * (q.t() @ k).square().sum() + (k.t() @ k).square().sum()
    within = (q.double() @ q.double().t() - k.double() @ k.double().t()).square().sum()
    assert abs(expanded - within) > 100 * within  # what is avoided


def test_bad_input():
    for loss in (spectral_contrastive_loss, barlow_twins_loss, vicreg_loss, gor_loss):
        with pytest.raises(ValueError, match="two samples"):
            loss(torch.randn(1, 4), torch.randn(1, 4))
        with pytest.raises(ValueError, match="one shape"):
            loss(torch.randn(3, 4), torch.randn(3, 5))
    with pytest.raises(ValueError, match="in_modal"):
        cyclip_loss(torch.randn(3, 4), torch.randn(3, 4), in_modal=-0.5)
