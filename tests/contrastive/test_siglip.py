"""siglip_loss and clipn_loss against the dense formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dense_losses import check_narrow, check_same, embeddings
from fastloss import SameId
from fastloss.contrastive import SigLipLoss, clipn_loss, clipn_terms, siglip_loss


def dense_siglip(q, k, scale, bias, normalize=False, positive=None):
    if normalize:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    positive = torch.eye(len(q), len(k), dtype=torch.bool) if positive is None else positive
    signs = torch.where(positive, 1.0, -1.0).to(q.dtype)
    return -F.logsigmoid(signs * (scale * q @ k.t() + bias)).sum(1)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 65])
def test_siglip(batch, normalize):
    q, k = embeddings(batch, 16, seed=batch)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (5.0, -3.0))
    check_same(
        lambda *x: siglip_loss(*x, normalize=normalize, reduction="none"),
        lambda *x: dense_siglip(*x, normalize=normalize),
        [q, k, scale, bias],
    )
    mean = dense_siglip(q, k, 5.0, -3.0, normalize).mean()
    torch.testing.assert_close(siglip_loss(q, k, 5.0, -3.0, normalize=normalize), mean)


def test_siglip_of_labels_and_of_another_rank():
    q, k = embeddings(6, 4)[0], embeddings(9, 4, seed=3)[0]
    rows, columns = torch.arange(6) % 3, torch.arange(9) % 3
    check_same(
        lambda q, k: siglip_loss(q, k, 2.0, -1.0, positive=SameId(rows, columns), reduction="sum"),
        lambda q, k: dense_siglip(q, k, 2.0, -1.0, positive=rows[:, None] == columns).sum(),
        [q, k],
    )
    check_same(
        lambda q, k: siglip_loss(q, k, 2.0, -1.0, positive=None, reduction="sum"),
        lambda q, k: F.softplus(2.0 * q @ k.t() - 1.0).sum(),
        [q, k],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_siglip_narrow(dtype):
    check_narrow(
        lambda q, k: siglip_loss(q, k, 10.0, -10.0, normalize=True),
        lambda q, k: dense_siglip(q, k, 10.0, -10.0, normalize=True).mean(),
        embeddings(33, 16),
        dtype,
    )


def test_siglip_beyond_exp():
    q = torch.tensor([[1e4], [-1e4]], dtype=torch.float64, requires_grad=True)
    loss = siglip_loss(q, q.detach(), 1.0, 0.0, reduction="none")
    assert torch.equal(loss, torch.zeros(2, dtype=torch.float64))
    loss = siglip_loss(q, -q.detach(), 1.0, 0.0, reduction="none")
    assert torch.equal(loss.detach(), torch.full((2,), 2e8, dtype=torch.float64))


def test_module_trains_scale_and_bias():
    loss = SigLipLoss()
    assert float(loss.scale.detach()) == pytest.approx(10) and float(loss.bias.detach()) == -10
    loss(*torch.randn(2, 8, 4)).backward()
    assert loss.log_scale.grad.abs() > 0 and loss.bias.grad.abs() > 0
    with pytest.raises(ValueError, match="init_scale"):
        SigLipLoss(init_scale=0)
    with pytest.raises(ValueError, match="one shape"):
        loss(torch.randn(3, 4), torch.randn(2, 4))


def dense_clipn(image, text, no, scale):
    logits = torch.stack((scale * image @ text.t(), scale * image @ no.t()), -1).log_softmax(-1)
    eye, batch = torch.eye(len(image), dtype=torch.bool), len(image)
    yes, none = -logits[..., 0][eye].sum() / batch, -logits[..., 1][~eye].sum() / max(batch * batch - batch, 1)
    return (yes + none + (2 - (2 - 2 * (text * no).sum(1) + 1e-4).sqrt()).mean()) / 2


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_clipn(batch):
    inputs = embeddings(batch, 8, count=3)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    check_same(
        lambda *x: clipn_loss(*x, normalize=True),
        lambda a, b, c, s: dense_clipn(*(F.normalize(x, dim=1) for x in (a, b, c)), s),
        [*inputs, scale],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipn_narrow(dtype):
    check_narrow(
        lambda *x: clipn_loss(*x, 7.0, normalize=True),
        lambda *x: dense_clipn(*(F.normalize(t.float() if t.dtype == torch.bfloat16 else t, dim=1) for t in x), 7.0),
        embeddings(17, 8, count=3),
        dtype,
    )


def test_clipn_where_softmax_underflows():
    image, text, no = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), -torch.eye(2).double()
    terms = clipn_terms(image, -text, -no, 500.0)
    assert float(terms.yes) == pytest.approx(1000.0)
    with pytest.raises(ValueError, match="one shape"):
        clipn_loss(image, text, no[:1], 1.0)
