"""angular_margin_loss and unpg_loss against the dense formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dense_losses import check_narrow, check_same, embeddings
from fastloss.contrastive import AngularMarginLoss, angular_margin_loss, unpg_loss

TARGET = torch.tensor([0, 3, 3, 6, 1, 0, 6, 6, 2, 5, 4, 3, 0])


def logits(x, weight, target, margin, kind):
    cosine = F.normalize(x, dim=1) @ F.normalize(weight, dim=1).t()
    own = F.one_hot(target, len(weight)).bool()
    if kind == "cosface":
        return torch.where(own, cosine - margin, cosine)
    return torch.where(own, (cosine.acos() + margin).cos(), cosine)


def dense_margin(x, weight, target=TARGET, scale=16.0, margin=0.5, kind="arcface"):
    return F.cross_entropy(scale * logits(x, weight, target, margin, kind), target, reduction="none")


def dense_unpg(x, weight, target=TARGET, scale=16.0, margin=0.5, kind="arcface", width=1.5):
    """As published: every pair i < j with different labels once, sorted, whiskers, appended to every row."""
    unit = F.normalize(x, dim=1)
    different = torch.triu(target[:, None] != target, diagonal=1)
    found = (unit @ unit.t())[different].sort().values
    first, third = found[int(0.25 * len(found))], found[int(0.75 * len(found))]
    low, high = first - width * (third - first), third + width * (third - first)
    kept = found[((found >= low) & (found <= high)).detach()]
    cosine = logits(x, weight, target, margin, kind)
    return F.cross_entropy(scale * torch.cat((cosine, kept.expand(len(x), -1)), 1), target, reduction="none")


@pytest.mark.parametrize("kind", ["arcface", "cosface"])
@pytest.mark.parametrize(("ours", "dense"), [(angular_margin_loss, dense_margin), (unpg_loss, dense_unpg)])
def test_against_dense(ours, dense, kind):
    x, weight = embeddings(13, 5)[0], embeddings(7, 5, seed=1)[0]
    check_same(
        lambda x, w: ours(x, w, TARGET, scale=16.0, margin=0.4, kind=kind, reduction="none"),
        lambda x, w: dense(x, w, margin=0.4, kind=kind),
        [x, weight],
    )


def test_whiskers_leave_outliers_out():
    x, weight = embeddings(13, 5)[0], embeddings(7, 5, seed=1)[0]
    narrow = unpg_loss(x, weight, TARGET, scale=16.0, width=0.1)
    torch.testing.assert_close(narrow, dense_unpg(x, weight, width=0.1).mean())
    assert narrow < unpg_loss(x, weight, TARGET, scale=16.0, width=5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow(dtype):
    x, weight = embeddings(13, 16)[0], embeddings(7, 16, seed=1)[0]
    check_narrow(
        lambda x, w: angular_margin_loss(x, w, TARGET, scale=16.0, reduction="sum"),
        lambda x, w: dense_margin(x, w).sum(),
        [x, weight],
        dtype,
    )


@pytest.mark.parametrize("loss", [angular_margin_loss, unpg_loss])
def test_ignored_rows(loss):
    x, weight = embeddings(13, 5)[0], embeddings(7, 5, seed=1)[0]
    target = TARGET.clone()
    target[[2, 8]] = -1
    with torch.no_grad():
        x[2] = float("nan")
    rows = loss(x, weight, target, reduction="none")
    kept = target >= 0
    torch.testing.assert_close(rows[kept], loss(x[kept], weight, target[kept], reduction="none"))
    assert (rows[~kept] == 0).all()
    gradient = torch.autograd.grad(loss(x, weight, target), x)[0]
    assert gradient[kept].isfinite().all() and (gradient[~kept] == 0).all()
    torch.testing.assert_close(loss(x, weight, target), rows.sum() / kept.sum())


def test_on_the_centre_and_without_negatives():
    x = torch.eye(3, dtype=torch.float64).requires_grad_()
    weight = torch.eye(3, dtype=torch.float64)
    loss = angular_margin_loss(x, weight, torch.arange(3), scale=1.0)
    expected = math.log(1 + 2 / math.exp(math.cos(0.5)))
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()
    same = unpg_loss(x, weight, torch.zeros(3, dtype=torch.long), scale=1.0)  # no pair of different labels
    torch.testing.assert_close(same, angular_margin_loss(x, weight, torch.zeros(3, dtype=torch.long), scale=1.0))
    assert torch.autograd.grad(same, x)[0].isfinite().all()
    alone = angular_margin_loss(x, weight[:1], torch.zeros(3, dtype=torch.long))
    assert float(alone.detach()) == 0


@pytest.mark.parametrize("unpg", [False, True])
def test_module(unpg):
    loss = AngularMarginLoss(4, 6, unpg=unpg)
    loss(torch.randn(5, 4), torch.tensor([0, 1, 5, 2, 1])).backward()
    assert loss.weight.grad.abs().sum() > 0


def test_bad_input():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(IndexError, match=r"target must be in \[0, 5\)"):
        angular_margin_loss(x, weight, torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match=r"weight must be \[C, 4\]"):
        angular_margin_loss(x, weight[:, :3], torch.arange(3))
    with pytest.raises(ValueError, match="kind must be"):
        AngularMarginLoss(4, 5, kind="sphereface")
    with pytest.raises(ValueError, match="width"):
        unpg_loss(x, weight, torch.arange(3), width=-1.0)
