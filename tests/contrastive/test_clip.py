"""clip_loss against the dense formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastloss.contrastive import ClipLoss, clip_loss


def dense(q, k, scale, normalize=False, label_smoothing=0.0):
    if normalize:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits, own = scale * q @ k.t(), torch.arange(len(q))
    both = (F.cross_entropy(z, own, label_smoothing=label_smoothing) for z in (logits, logits.t()))
    return sum(both) / 2


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("batch", [1, 2, 65])
def test_value_and_gradients(batch, normalize, label_smoothing):
    torch.manual_seed(batch)
    q, k = (torch.randn(batch, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    ours = clip_loss(q, k, scale, normalize=normalize, label_smoothing=label_smoothing)
    theirs = dense(q, k, scale, normalize, label_smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, right in zip(
        torch.autograd.grad(ours, (q, k, scale)), torch.autograd.grad(theirs, (q, k, scale)), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


def test_module_trains_its_scale():
    loss = ClipLoss()
    q, k = torch.randn(2, 8, 4)
    loss(q, k).backward()
    assert loss.log_scale.grad is not None and loss.log_scale.grad.abs() > 0
    assert float(loss.scale.detach()) == pytest.approx(1 / 0.07)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"one shape \[B, D\]"):
        clip_loss(torch.randn(3, 4), torch.randn(2, 4), 1.0)
    with pytest.raises(ValueError, match="must be finite and > 0"):
        clip_loss(torch.randn(3, 4), torch.randn(3, 4), 0.0)


def test_a_number_as_scale_is_not_rounded():
    q, k = (torch.randn(5, 3, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(clip_loss(q, k, 0.1), dense(q, k, 0.1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_scale_of_each_row(label_smoothing):
    torch.manual_seed(0)
    q, k = (torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = (torch.rand(7, dtype=torch.float64) * 9 + 1).requires_grad_()
    ours = clip_loss(q, k, scale, label_smoothing=label_smoothing)
    theirs = dense(q, k, scale[:, None], label_smoothing=label_smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, right in zip(
        torch.autograd.grad(ours, (q, k, scale)), torch.autograd.grad(theirs, (q, k, scale)), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)
