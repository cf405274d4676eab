"""TACO, Glocal-IB, SiamLIP, BCT and BT^2, RMT: against the formulas of their papers' code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dense_losses import check_narrow, check_same, embeddings
from fastloss.contrastive import (
    BilinearInfoNCE,
    bct_loss,
    bilinear_info_nce_loss,
    bt2_loss,
    glocal_alignment_loss,
    nearest_prototypes,
    rmt_loss,
    siamlip_loss,
    view_contrast_loss,
)


def dense_bilinear(x, k, weight):
    return F.cross_entropy(x @ weight @ k.t(), torch.arange(len(x)), reduction="none")


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_bilinear(batch):
    inputs = [*embeddings(batch, 6, count=1), *embeddings(batch, 4, seed=1, count=1), *embeddings(6, 4, count=1)]
    check_same(lambda *x: bilinear_info_nce_loss(*x, reduction="none"), dense_bilinear, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bilinear_narrow(dtype):
    inputs = [*embeddings(17, 6), *embeddings(6, 6, count=1)]
    check_narrow(bilinear_info_nce_loss, lambda *x: dense_bilinear(*x).mean(), inputs, dtype, k=8.0)


def test_bilinear_module():
    loss = BilinearInfoNCE(4, 3)
    loss(torch.randn(5, 4), torch.randn(5, 3)).backward()
    assert loss.weight.shape == (4, 3) and loss.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="weight must be"):
        loss(torch.randn(5, 3), torch.randn(5, 4))


@pytest.mark.parametrize("softmax", ["predictions", "targets"])
@pytest.mark.parametrize("detach", [False, True])
def test_glocal(softmax, detach):
    def dense(p, z):
        z = z.detach() if detach else z
        logits = 3.0 * F.normalize(p, dim=2) @ F.normalize(z, dim=2).transpose(1, 2)
        logits = logits if softmax == "predictions" else logits.transpose(1, 2)
        return F.cross_entropy(logits, torch.arange(5).expand(3, 5))  # over dim 1

    check_same(
        lambda p, z: glocal_alignment_loss(p, z, scale=3.0, softmax=softmax, detach=detach),
        dense,
        embeddings(3, 5, 4),
    )


def test_glocal_bad_input():
    p = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="one shape"):
        glocal_alignment_loss(p, p[:1])
    with pytest.raises(ValueError, match="softmax must be"):
        glocal_alignment_loss(p, p, softmax="rows")


def test_siamlip():
    def dense(a, b, c, d):
        return sum(2 - 2 * F.cosine_similarity(p, v.detach()).mean() for p, v in ((a, b), (c, d))) / 2

    check_same(siamlip_loss, dense, embeddings(9, 5, count=4))


def heads(seed=0):
    features, old_part, old = embeddings(11, 6, seed=seed, count=3)
    part, new = embeddings(11, 4, seed=seed + 1)
    weight, old_weight = embeddings(7, 6, seed=seed + 2)
    return features, weight, old_part, old_weight, old, part, new, torch.arange(11) % 7


def test_bct():
    features, weight, _, old_weight, *_, target = heads()

    def dense(x, w, o):
        return F.cross_entropy(x @ w.t(), target) + 10 * F.cross_entropy(x @ o.detach().t(), target)

    check_same(lambda x, w, o: bct_loss(x, w, target, o), dense, [features, weight, old_weight])


def test_bt2():
    *inputs, target = heads()

    def dense(x, w, a, ow, old, b, new):
        loss = F.cross_entropy(x @ w.t(), target) + 10 * F.cross_entropy(a @ ow.detach().t(), target)
        loss = loss + 5 * (1 - F.cosine_similarity(a, old.detach())).mean()
        return loss + (1 - F.cosine_similarity(b, new.detach())).mean()

    check_same(lambda x, w, *rest: bt2_loss(x, w, target, *rest), dense, inputs)
    with pytest.raises(ValueError, match="old_cosine"):
        bt2_loss(inputs[0], inputs[1], target, *inputs[2:], old_cosine=-1.0)


def dense_views(views, scale):
    """HobbitLong's form: features [B, V, D], every view an anchor."""
    x = F.normalize(torch.cat(views), dim=1)
    batch, total = len(views[0]), len(x)
    z = scale * x @ x.t()
    self = torch.eye(total, dtype=torch.bool)
    mask = torch.eye(batch, dtype=torch.bool).repeat(len(views), len(views)) & ~self
    log_p = z - z.masked_fill(self, -float("inf")).logsumexp(1, keepdim=True)
    return -((mask * log_p).sum(1) / mask.sum(1)).mean()


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_view_contrast(batch):
    check_same(lambda *x: view_contrast_loss(x, 10.0), lambda *x: dense_views(x, 10.0), embeddings(batch, 5, count=3))
    with pytest.raises(ValueError, match="two views"):
        view_contrast_loss([torch.randn(3, 4)])


def test_rmt():
    logits = embeddings(9, 6, count=3)
    views = embeddings(9, 5, seed=4, count=3)

    def dense(x, a, t, *views):
        t = t.detach()

        def symmetric(s):
            return -(t.softmax(1) * s.log_softmax(1) + s.softmax(1) * t.log_softmax(1)).sum(1) / 2

        return ((symmetric(x) + symmetric(a)) / 2).mean() * 0.5 + 2.0 * dense_views(views, 10.0)

    check_same(
        lambda x, a, t, *views: rmt_loss(x, a, t, views, cross_entropy_weight=0.5, contrast_weight=2.0),
        dense,
        [*logits, *views],
    )


def test_nearest_prototypes():
    x, prototypes = embeddings(9, 4)[0], embeddings(5, 4, seed=3)[0]
    right = prototypes[F.cosine_similarity(x[:, None], prototypes[None], dim=2).argmax(1)]
    ours = nearest_prototypes(x, prototypes)
    assert torch.equal(ours, right) and not ours.requires_grad
