"""BlockRank and AR2 on lists of scores."""

from __future__ import annotations

import math

import pytest
import torch

from dense_losses import check_narrow, check_same, embeddings
from fastloss.contrastive import ar2_retriever_loss, blockrank_loss


def problem():
    (scores,) = embeddings(6, 9, count=1)
    generator = torch.Generator().manual_seed(0)
    relevant = torch.rand(6, 9, generator=generator) > 0.7
    valid = torch.rand(6, 9, generator=generator) > 0.2
    relevant[1], relevant[2] = False, True  # nothing relevant; everything relevant
    valid[2] = True
    relevant[0, 0] = valid[0, 0] = True
    return scores, relevant, valid


def test_blockrank():
    scores, relevant, valid = problem()

    def dense(a):
        rows = []
        for row, good, kept in zip(20 * a, relevant & valid, valid, strict=True):
            rows.append(row[kept].logsumexp(0) - row[good].logsumexp(0) if good.any() else row.sum() * 0)
        return torch.stack(rows)

    check_same(lambda a: blockrank_loss(a, relevant, valid, reduction="none"), dense, [scores])
    some = (relevant & valid).any(1)
    torch.testing.assert_close(blockrank_loss(scores, relevant, valid), dense(scores)[some].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blockrank_narrow(dtype):
    scores, relevant, _ = problem()
    kept = relevant.any(1)

    def dense(a):
        z = 20 * (a.float() if a.dtype == torch.bfloat16 else a)
        good = z.masked_fill(~relevant, -float("inf"))[kept]
        return (z[kept].logsumexp(1) - good.logsumexp(1)).mean()

    check_narrow(lambda a: blockrank_loss(a, relevant), dense, [scores], dtype, k=16.0)


def test_a_list_that_is_padding():
    scores = torch.zeros(2, 3, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    loss = blockrank_loss(scores, ~nothing, nothing)
    assert float(loss.detach()) == 0 and (torch.autograd.grad(loss, scores)[0] == 0).all()


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_ar2(weight):
    scores, ranker = embeddings(6, 9)

    def dense(z, r):
        r, p = r.detach(), z.softmax(1)
        distilled = -((r / 2).softmax(1) * p.log()).sum(1)
        reward = torch.stack((r[:, :1].expand_as(r), r), -1).softmax(-1)[..., 0].log()
        return (1 - weight) * distilled + weight * (reward * p.log()).sum(1)

    check_same(
        lambda z, r: ar2_retriever_loss(z, r, adversarial_weight=weight, temperature=2.0, reduction="none"),
        dense,
        [scores, ranker],
    )


def test_ar2_far_apart():
    z = torch.tensor([[0.0, 1e4]], requires_grad=True)
    loss = ar2_retriever_loss(z, torch.tensor([[1e4, 0.0]]))
    assert float(loss.detach()) == pytest.approx(5e3 + 0.5 * math.log(2) * 1e4)
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean_valid", "mean", "sum", "none"])
@pytest.mark.parametrize("where", ["relevant", "other", "padding"])
def test_blockrank_of_nan(where, reduction):
    scores = torch.randn(3, 4)
    relevant = torch.tensor([[True, False, False, False]]).expand(3, 4)
    valid = torch.tensor([[True, True, True, False]]).expand(3, 4)
    scores[1, {"relevant": 0, "other": 1, "padding": 3}[where]] = float("nan")
    loss = blockrank_loss(scores, relevant, valid, reduction=reduction)
    assert bool(loss.isnan().any()) == (where != "padding")
    assert reduction != "none" or loss.isfinite()[[0, 2]].all()


def test_bad_input():
    scores, relevant, valid = problem()
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"scale must be finite and > 0, got {scale}"):
            blockrank_loss(scores, relevant, scale=scale)
    with pytest.raises(ValueError, match="relevant must have shape"):
        blockrank_loss(scores, relevant[:, :4])
    with pytest.raises(TypeError, match=r"valid must be torch\.bool"):
        blockrank_loss(scores, relevant, valid.int())
    with pytest.raises(ValueError, match=r"must be \[B, K\]"):
        ar2_retriever_loss(scores, scores[:, :3])
    with pytest.raises(ValueError, match="adversarial_weight"):
        ar2_retriever_loss(scores, scores, adversarial_weight=1.5)
    with pytest.raises(ValueError, match="temperature"):
        ar2_retriever_loss(scores, scores, temperature=0.0)
