"""fastloss.compat.open_clip against the dense formulas and against open_clip."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastloss.compat.open_clip import ClipLoss, SigLipLoss
from peers import check_same, embeddings, largest_saved, module_of
from tolerance import check_gradient


def dense_clip(image, text, scale, bias=None):
    logits = scale * image @ text.t() + (0.0 if bias is None else bias)
    own = torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


def dense_siglip(image, text, scale, bias=None):
    logits = scale * image @ text.t() + (0.0 if bias is None else bias)
    sign = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return torch.logaddexp(-sign * logits, torch.zeros_like(logits)).sum() / len(image)


def problem(batch, dim=16, dtype=torch.float64):
    image, text = embeddings(batch, dim, dtype=dtype), embeddings(batch, dim, dtype=dtype)
    scale = torch.tensor(3.0, dtype=dtype, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=dtype, requires_grad=True)
    return image, text, scale, bias


@pytest.mark.parametrize("batch", [1, 2, 37])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("loss, dense", [(ClipLoss(), dense_clip), (SigLipLoss(), dense_siglip)])
def test_formula(loss, dense, with_bias, batch):
    image, text, scale, bias = problem(batch)
    bias = bias if with_bias else None
    inputs = [x for x in (image, text, scale, bias) if x is not None]
    check_same(lambda: loss(image, text, scale, bias), lambda: dense(image, text, scale, bias), inputs)


@pytest.mark.parametrize("name, loss", [("ClipLoss", ClipLoss), ("SigLipLoss", SigLipLoss)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_library(name, loss, with_bias):
    theirs = getattr(module_of("open_clip.loss"), name)
    image, text, scale, bias = problem(29)
    bias = bias if with_bias else None
    inputs = [x for x in (image, text, scale, bias) if x is not None]
    check_same(lambda: loss()(image, text, scale, bias), lambda: theirs()(image, text, scale, bias), inputs)
    ours, right = (made(image, text, scale, bias, output_dict=True) for made in (loss(), theirs()))
    assert ours.keys() == right.keys() == {"contrastive_loss"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss, dense", [(ClipLoss(), dense_clip), (SigLipLoss(), dense_siglip)])
def test_low_precision(loss, dense, dtype):
    image, text = (F.normalize(embeddings(33, 24, dtype=dtype).detach(), dim=1).requires_grad_() for _ in range(2))

    def gradients(f, kind):
        q, k = (x.detach().to(kind).requires_grad_() for x in (image, text))
        return torch.autograd.grad(f(q, k, 20.0, -10.0), (q, k))

    for ours, torchs, right in zip(
        gradients(loss, dtype), gradients(dense, dtype), gradients(dense, torch.float64), strict=True
    ):
        check_gradient(ours, torchs, right, dtype, k=20.0)  # scores of 20 are rounded by 20 eps, and slopes with them


def test_bias_is_in_the_graph():
    image, text, scale, bias = problem(5)
    ClipLoss()(image, text, scale, bias).backward()
    assert bias.grad == 0


@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()])
def test_no_matrix_is_kept(loss):
    image, text, scale, bias = problem(200, 8)
    assert largest_saved(lambda: loss(image, text, scale, bias)) <= 200 * 9  # the rows' tables, and the features


def test_errors():
    with pytest.raises(ValueError, match="use_horovod"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="bidir, shift, reduce, gather"):
        SigLipLoss(dist_impl="ring")
    image, text, scale, bias = problem(4)
    for loss in (ClipLoss(), SigLipLoss()):
        with pytest.raises(ValueError, match=r"one shape \[B, D\]"):
            loss(image, text[:3], scale, bias)
        for shape in ((1, 4, -1), (-1,)):
            with pytest.raises(ValueError, match=r"one shape \[B, D\]"):
                loss(image.reshape(shape), text.reshape(shape), scale, bias)
    with pytest.raises(ValueError, match=r"logit_bias must be one number, got shape \[4\]"):
        SigLipLoss()(image, text, scale, torch.zeros(4))
    for made in (ClipLoss(rank=0, world_size=2), SigLipLoss(rank=0, world_size=2)):
        with pytest.raises(RuntimeError, match="init_process_group"):
            made(image, text, scale, bias)
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size\)"):
        ClipLoss(rank=2, world_size=2)(image, text, scale)
