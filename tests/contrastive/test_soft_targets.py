"""Soft targets without matrices: distill_clip_loss, soft_clip_loss and swalip_loss against dense formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dense_losses import check_narrow, check_same, embeddings
from fastloss.contrastive import attention, distill_clip_loss, soft_clip_loss, soft_targets, swalip_loss


def cross_entropies(z, row_targets, column_targets):
    rows, columns = -(row_targets * z.log_softmax(1)).sum(1), -(column_targets * z.log_softmax(0)).sum(0)
    return (rows + columns) / 2


def dense_distill(q, k, tq, tk, scale, teacher_scale):
    t = teacher_scale * tq @ tk.t()
    return cross_entropies(scale * q @ k.t(), t.softmax(1), t.softmax(0))


def dense_soft_clip(q, k, scale, detach=True):
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    t = (scale * k @ k.t()).softmax(1)
    t = t.detach() if detach else t
    return cross_entropies(scale * q @ k.t(), t, t.t())


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_distill(batch, monkeypatch):
    monkeypatch.setattr(attention, "_HELD", 3 * batch)  # three rows at a time
    q, k = embeddings(batch, 6)
    tq, tk = (x.detach() for x in embeddings(batch, 9, seed=2))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    check_same(
        lambda *x: distill_clip_loss(*x[:2], tq, tk, x[2], 2.5, reduction="none"),
        lambda *x: dense_distill(*x[:2], tq, tk, x[2], 2.5),
        [q, k, scale],
    )


def test_no_gradient_into_the_teacher():
    q, k, tq, tk = embeddings(5, 4, count=4)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    distill_clip_loss(q, k, tq, tk, 3.0, scale, normalize=True).backward()
    assert q.grad is not None and tq.grad is None and tk.grad is None and scale.grad is None


@pytest.mark.parametrize("detach", [False, True])
def test_soft_clip(detach, monkeypatch):
    q, k = embeddings(17, 6)
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(attention, "_HELD", 70)  # four rows at a time
    inputs = [q, k] if detach else [q, k, scale]  # the dense teacher is detached whole: compare what remains
    check_same(
        lambda q, k, s=8.0: soft_clip_loss(q, k, s, detach=detach, reduction="none"),
        lambda q, k, s=8.0: dense_soft_clip(q, k, s, detach),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_clip_narrow(dtype):
    check_narrow(
        lambda q, k: soft_clip_loss(q, k),
        lambda q, k: dense_soft_clip(q, k, 8.0).mean(),
        embeddings(17, 6),
        dtype,
        k=8.0,
    )


def test_gradient_twice():
    q, k = embeddings(4, 3)
    assert torch.autograd.gradgradcheck(lambda q, k: soft_clip_loss(q, k, detach=False), (q, k))


def sinkhorn(z, iterations):
    """As published: prototypes in rows, samples in columns."""
    p = z.exp().t()
    p = p / p.sum()
    for _ in range(iterations):
        p = p / p.sum(1, keepdim=True) / p.shape[0]
        p = p / p.sum(0, keepdim=True) / p.shape[1]
    return (p * p.shape[1]).t()


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn(iterations):
    q, k = (F.normalize(x, dim=1).detach() for x in embeddings(12, 4))
    z = 20 * q @ k.t()
    ours = (z + soft_targets.sinkhorn_bias(q, k, 20.0, iterations)).softmax(1)
    torch.testing.assert_close(ours, sinkhorn(z, iterations), rtol=1e-9, atol=1e-12)


def dense_swalip(a, b, c, d, scale):
    images, texts = ([F.normalize(x, dim=1) for x in pair] for pair in ((a, b), (c, d)))
    total = 0
    for i in range(2):
        for j in range(2):
            z, t = images[i] @ texts[j].t(), (images[1 - i] @ texts[1 - j].t()).detach()
            targets = sinkhorn(t / 0.05, 3), sinkhorn(t.t() / 0.05, 3).t()
            total = total + cross_entropies(scale * z, *targets).mean()
    return total / 4


def test_swalip():
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    check_same(lambda a, b, c, d, s: swalip_loss((a, b), (c, d), s), dense_swalip, [*embeddings(9, 5, count=4), scale])


def test_bad_input():
    q, k = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="one batch"):
        distill_clip_loss(q, k, q[:2], k[:2], 1.0, 1.0)
    with pytest.raises(ValueError, match="one shape"):
        soft_clip_loss(q, k[:2])
    with pytest.raises(ValueError, match="two views"):
        swalip_loss((q,), (k, k), 1.0)


SCALED = {
    "distill": lambda q, k, s: distill_clip_loss(q, k, q, k, s, 1.0),
    "distill, teacher": lambda q, k, s: distill_clip_loss(q, k, q, k, 1.0, s),
    "soft_clip": soft_clip_loss,
    "swalip": lambda q, k, s: swalip_loss((q, q), (k, k), s),
    "swalip, epsilon": lambda q, k, s: swalip_loss((q, q), (k, k), 1.0, epsilon=s),
}


@pytest.mark.parametrize("loss", SCALED.values(), ids=SCALED.keys())
def test_a_scale_is_one_positive_number(loss):
    q, k = torch.randn(2, 3, 4)
    for scale, message in (
        (torch.ones(3), r"one element, got \[3\]"),
        (0.0, r"must be finite and > 0, got 0\.0"),
        (-2.0, r"must be finite and > 0, got -2\.0"),
        (float("nan"), "must be finite and > 0, got nan"),
        (torch.tensor(-2.0), r"must be > 0, got -2\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(q, k, scale)
