"""mw_loss against all comparisons, and the rate of its histogram; roc_auc against counting."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dense_losses import check_narrow, check_same, embeddings
from fastloss import Diagonal, SameId
from fastloss.contrastive import mw_loss, roc_auc


def dense_query(q, k, scale):
    z = scale * q @ k.t()
    others = ~torch.eye(len(q), dtype=torch.bool)
    x = (z - z.diagonal()[:, None])[others].view(len(q), -1)
    return F.softplus(x, threshold=100).mean(1)


def dense_pooled(z, positive, excluded=None):
    negative = ~positive if excluded is None else ~positive & ~excluded
    x = z[negative][:, None] - z[positive & (negative | positive)][None]
    return F.softplus(x, threshold=100).mean()


@pytest.mark.parametrize("batch", [2, 3, 65])
def test_query(batch):
    q, k = embeddings(batch, 8, seed=batch)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    check_same(lambda *x: mw_loss(*x, reduction="none"), dense_query, [q, k, scale])
    torch.testing.assert_close(mw_loss(q, k, 3.0), dense_query(q, k, 3.0).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_query_narrow(dtype):
    check_narrow(
        lambda q, k: mw_loss(q, k, 5.0, normalize=True),
        lambda q, k: dense_query(F.normalize(q, dim=1), F.normalize(k, dim=1), 5.0).mean(),
        embeddings(33, 16),
        dtype,
    )


@pytest.mark.parametrize("mode", ["query", "pooled"])
def test_one_example_has_no_negative(mode):
    q, k = embeddings(1, 4)
    loss = mw_loss(q, k, 2.0, mode=mode)
    assert float(loss) == 0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(loss, (q, k)))


@pytest.mark.parametrize("labelled", [False, True])
def test_pooled_converges_to_all_comparisons(labelled):
    q, k = embeddings(24, 16)
    labels = torch.arange(24) % 5
    positive = labels[:, None] == labels if labelled else torch.eye(24, dtype=torch.bool)
    exact = dense_pooled(20 * F.normalize(q, dim=1) @ F.normalize(k, dim=1).t(), positive)
    sets = {"positive": SameId(labels, labels)} if labelled else {}
    errors = []
    for bins, bound in ((256, 1e-4), (1024, 6e-6), (4096, 4e-7)):
        ours = mw_loss(q, k, 20.0, mode="pooled", bins=bins, normalize=True, **sets)
        errors.append(float((ours - exact).abs() / exact))
        assert errors[-1] < bound
    assert errors[0] > 8 * errors[1] > 64 * errors[2]  # the square of the step


def piecewise(q, k, scale, bins, low, high, positive, exact_positives):
    """The pooled loss as what it is: softplus interpolated between the centers."""
    z = scale * q @ k.t()
    centers = torch.linspace(low, high, bins, dtype=z.dtype)

    def interpolated(x, table):
        y = (x - low) / (high - low) * (bins - 1)
        left = y.detach().floor().long().clamp(0, bins - 2)
        return table[..., left] * (1 - (y - left)) + table[..., left + 1] * (y - left)

    own, negatives = z[positive], z[~positive]
    if exact_positives:
        return interpolated(negatives, F.softplus(centers[None] - own[:, None], threshold=800)).mean()
    grid = F.softplus(centers[:, None] - centers[None], threshold=800)  # [negative, positive]
    return interpolated(negatives, interpolated(own, grid).mean(1)).mean()


@pytest.mark.parametrize("labelled", [False, True])
def test_pooled_gradient_is_that_of_its_own_value(labelled):
    q, k = embeddings(13, 6, seed=5)
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(13) % 4
    positive = labels[:, None] == labels if labelled else torch.eye(13, dtype=torch.bool)
    z = (4 * q @ k.t()).detach()
    counted = z if labelled else z[~positive]  # the bins hold all z that are counted, and little more
    low, high = float(counted.min()), float(counted.max())
    low, high = low - 1e-4 * (high - low), high + 1e-4 * (high - low)
    sets = {"positive": SameId(labels, labels)} if labelled else {}
    check_same(
        lambda *x: mw_loss(*x, mode="pooled", bins=64, **sets),
        lambda *x: piecewise(*x, 64, low, high, positive, not labelled),
        [q, k, scale],
    )


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("offset", [-200.0, 0.0, 200.0])
def test_pooled_far_apart(offset, labelled):
    """All negatives far below or above all positives: softplus is nearly 0 or linear, and so are the bins."""
    q, k = (F.pad(x, (0, 1), value=1.0) for x in embeddings(12, 6))
    positive = torch.eye(12, dtype=torch.bool)
    with torch.no_grad():
        q[:, -1] = offset
        k[:, :-1] = k[:, :-1] / 4 - (offset / 36) * q[:, :-1]
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    sets = {"positive": SameId(torch.arange(12), torch.arange(12))} if labelled else {}
    ours = mw_loss(q, k, mode="pooled", bins=4096, **sets)
    exact = dense_pooled(q @ k.t(), positive)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-7)
    for a, b in zip(torch.autograd.grad(ours, (q, k)), torch.autograd.grad(exact, (q, k)), strict=True):
        assert float((a - b).norm()) < 2e-2 * float(b.norm()) + 1e-7


def test_pooled_with_a_large_row():
    """One huge query and one huge key: their norms say nothing about where the loss bends."""
    q, k = embeddings(64, 16, seed=2)
    with torch.no_grad():
        q[0] *= 100
        k[1] *= 100
    ours, exact = mw_loss(q, k, mode="pooled"), dense_pooled(q @ k.t(), torch.eye(64, dtype=torch.bool))
    assert abs(float((ours / exact - 1).detach())) < 1e-3
    for a, b in zip(torch.autograd.grad(ours, (q, k)), torch.autograd.grad(exact, (q, k)), strict=True):
        assert float((a - b).norm()) < 1e-2 * float(b.norm())


def test_pooled_with_labels_saves_no_table_of_bins():
    q, k = embeddings(20, 4)
    labels = torch.arange(20) % 3
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        mw_loss(q, k, mode="pooled", bins=512, positive=SameId(labels, labels))
    assert max(saved) <= 4 * 512


def test_pooled_in_parts(monkeypatch):
    from fastloss.contrastive import mann_whitney

    q, k = embeddings(9, 4)
    whole = torch.autograd.grad(mw_loss(q, k, mode="pooled", bins=32), (q, k))
    monkeypatch.setattr(mann_whitney, "_HELD", 64)
    parts = torch.autograd.grad(mw_loss(q, k, mode="pooled", bins=32), (q, k))
    torch.testing.assert_close(whole, parts)


def test_bad_input():
    q, k = embeddings(3, 4)
    with pytest.raises(ValueError, match="mode must be"):
        mw_loss(q, k, mode="all")
    with pytest.raises(ValueError, match="no rows"):
        mw_loss(q, k, mode="pooled", reduction="none")
    with pytest.raises(ValueError, match="diagonal"):
        mw_loss(q, k, positive=Diagonal(1))
    with pytest.raises(ValueError, match="finite"):
        mw_loss(q * float("nan"), k, mode="pooled")
    with pytest.raises(ValueError, match="bins"):
        mw_loss(q, k, mode="pooled", bins=1)


def counted(z, positive, negative):
    p, n = z[positive], z[negative]
    return ((p[:, None] > n).double() + (p[:, None] == n).double() / 2).mean()


@pytest.mark.parametrize("labelled", [False, True])
def test_roc_auc(labelled):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randint(-2, 3, (2, 17, 3), generator=generator).double()  # with many ties
    labels = torch.arange(17) % 4
    if labelled:
        off = ~torch.eye(17, dtype=torch.bool)
        same = labels[:, None] == labels
        right = counted(q @ q.t(), same & off, ~same)
        ours = roc_auc(q, positive=SameId(labels))
    else:
        eye = torch.eye(17, dtype=torch.bool)
        right, ours = counted(q @ k.t(), eye, ~eye), roc_auc(q, k)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


def test_roc_auc_by_histogram_and_without_pairs():
    q, k = (x.detach() for x in embeddings(40, 8))
    exact = roc_auc(q, q + 0.5 * k, normalize=True)
    assert abs(float(roc_auc(q, q + 0.5 * k, normalize=True, bins=4096) - exact)) < 1e-4
    assert abs(float(roc_auc(q, q + 0.5 * k, bins=8192) - roc_auc(q, q + 0.5 * k))) < 1e-4
    assert roc_auc(q, k, positive=None).isnan()
    assert roc_auc(q).isnan()
