"""M3CoL's mixup loss, Metrix and PamC against dense formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dense_losses import check_narrow, check_same, embeddings
from fastloss.contrastive import draw_mixture, metrix_loss, mixup_info_nce_loss, pamc_loss


def dense_mixup(q, k, permutation, share, scale=10.0):
    z = scale * F.normalize(q, dim=1) @ F.normalize(k, dim=1).t()
    targets = torch.zeros_like(z)
    rows = torch.arange(len(q))
    targets = targets.index_put((rows, rows), share.to(z), accumulate=True)
    targets = targets.index_put((rows, permutation), 1 - share.to(z), accumulate=True)
    return -(targets * z.log_softmax(1)).sum(1) / 2 - (targets * z.log_softmax(0)).sum(0) / 2


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_mixup(batch):
    q, k = embeddings(batch, 8)
    permutation, share = draw_mixture(batch, generator=torch.Generator().manual_seed(batch))
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    check_same(
        lambda q, k, s: mixup_info_nce_loss(q, k, permutation, share, s, reduction="none"),
        lambda q, k, s: dense_mixup(q, k, permutation, share, s),
        [q, k, scale],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixup_narrow(dtype):
    permutation, share = draw_mixture(17, 1.0, generator=torch.Generator().manual_seed(0))
    check_narrow(
        lambda q, k: mixup_info_nce_loss(q, k, permutation, share),
        lambda q, k: dense_mixup(q, k, permutation, share).mean(),
        embeddings(17, 8),
        dtype,
        k=8.0,
    )


def test_mixture_is_a_permutation_and_shares():
    permutation, share = draw_mixture(200, 0.15, generator=torch.Generator().manual_seed(0))
    assert sorted(permutation.tolist()) == list(range(200))
    assert ((share >= 0) & (share <= 1)).all() and ((share < 0.05) | (share > 0.95)).sum() > 100  # Beta(0.15, 0.15)
    with pytest.raises(ValueError, match="alpha"):
        draw_mixture(3, 0.0)


def dense_metrix(a, p, n, share, pair, weight):
    a, p, n = (F.normalize(x, dim=1) for x in (a, p, n))
    mixed = share[:, None] * (p if pair == "positive-negative" else a) + (1 - share[:, None]) * n
    d = [(a - x).norm(dim=1) for x in (p, n, mixed)]
    mixture = share * d[2] + (1 - share) * (0.5 - d[2]).relu()
    return d[0] + (0.5 - d[1]).relu() + weight * mixture


@pytest.mark.parametrize("pair", ["positive-negative", "anchor-negative"])
def test_metrix(pair):
    inputs = embeddings(12, 2, count=3)  # of two dimensions, so that some negatives are within the margin
    share = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    check_same(
        lambda *x: metrix_loss(*x, share, pair=pair, weight=0.3, reduction="none"),
        lambda *x: dense_metrix(*x, share, pair, 0.3),
        inputs,
    )
    a, p, n = inputs
    mixed = 0.25 * F.normalize(p, dim=1) + 0.75 * F.normalize(n, dim=1)
    ours = metrix_loss(a, p, n, 0.25, mixed=mixed, normalize=True)
    assert ours.isfinite() and ours > 0


def test_bad_mixtures():
    q, k = torch.randn(2, 3, 4)
    permutation, share = draw_mixture(3)
    with pytest.raises(ValueError, match=r"share must have shape \[3\]"):
        mixup_info_nce_loss(q, k, permutation, share[:2])
    with pytest.raises(IndexError, match="columns must be in"):
        mixup_info_nce_loss(q, k, permutation + 1, share)
    with pytest.raises(ValueError, match="pair must be"):
        metrix_loss(q, k, k, 0.5, pair="all")
    with pytest.raises(ValueError, match="share must be"):
        metrix_loss(q, k, k, share[:2])


def dense_pamc(z, adjacency, clusters, count, tau):
    cosine = F.normalize(z, dim=1) @ F.normalize(z, dim=1).t()
    cosine = cosine * (1 - torch.eye(len(z)).to(z))
    attraction = ((tau * cosine).exp() * adjacency).sum(1)
    centre = F.normalize(F.one_hot(clusters, count).to(z).t() @ z, dim=1)
    between = (centre @ centre.t()) * (1 - torch.eye(count).to(z))
    return -(attraction + 1e-10).log().mean() + ((tau * between).exp().sum(1) + 1e-10).log().mean()


def graph(nodes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    adjacency = torch.rand(nodes, nodes, generator=generator, dtype=torch.float64)
    adjacency = torch.where(adjacency > 0.6, adjacency, 0.0)
    adjacency.fill_diagonal_(0.5)
    rows, columns = adjacency.nonzero().t()
    return adjacency, rows, columns, adjacency[rows, columns]


def test_pamc():
    adjacency, rows, columns, weights = graph(20)
    clusters = torch.randint(0, 4, (20,), generator=torch.Generator().manual_seed(0))
    check_same(
        lambda z: pamc_loss(z, rows, columns, weights, clusters, 5, tau=1.5),  # cluster 4 is empty
        lambda z: dense_pamc(z, adjacency, clusters, 5, 1.5),
        embeddings(20, 6, count=1),
    )


def test_pamc_bad_input():
    _, rows, columns, weights = graph(5)
    z, clusters = torch.randn(5, 3), torch.arange(5)
    with pytest.raises(IndexError, match=r"clusters must be in \[0, 4\)"):
        pamc_loss(z, rows, columns, weights, clusters, 4)
    with pytest.raises(IndexError, match="rows must be in"):
        pamc_loss(z[:3], rows, columns, weights, clusters[:3], 5)
    with pytest.raises(ValueError, match="weights must have shape"):
        pamc_loss(z, rows, columns, weights[:-1], clusters, 5)
