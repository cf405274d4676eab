"""EQ-Net's elastic quantiser and losses against formulas in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastloss.quant.recipes import (
    ElasticQuantizer,
    ElasticSetting,
    guidance_losses,
    sample_setting,
    weight_distribution_loss,
)

SETTINGS = [ElasticSetting(*c) for c in itertools.product((2, 5, 8), (True, False), ("tensor", "row"))]


@pytest.mark.parametrize("setting", SETTINGS)
def test_quantizer_is_the_formula(setting: ElasticSetting) -> None:
    x = torch.randn(6, 5, 4, dtype=torch.float64, requires_grad=True)
    module = ElasticQuantizer(x, search=True)
    scale, offset = module.parameters_of(*setting)
    with torch.no_grad():
        scale.mul_(-1.3)  # |step| is what counts
        if setting.symmetric:
            scale.mul_(0.5)  # some numbers fall outside
    span = 2.0**setting.bits
    low, high = (-span / 2, span / 2 - 1) if setting.symmetric else (0.0, span - 1)
    s = scale.detach().abs().reshape(-1, 1, 1)
    beta = torch.zeros(1, 1, 1) if offset is None else offset.detach().reshape(-1, 1, 1)
    v = (x.detach() - beta) / s
    weight = torch.randn(6, 5, 4, dtype=torch.float64)
    y = module(x, *setting)
    assert torch.allclose(y, v.clamp(low, high).round() * s + beta, rtol=1e-12, atol=1e-12)
    (y * weight).sum().backward()
    inside = (v >= low) & (v <= high)
    assert x.grad is not None and torch.allclose(x.grad, weight * inside)
    rows = setting.granularity == "row"
    ds = (weight * torch.where(inside, v.round() - v, v.clamp(low, high))).reshape(6, -1).sum(1)
    ds = ds if rows else ds.sum().reshape(1)
    assert scale.grad is not None
    assert torch.allclose(scale.grad, -ds / ((20 if rows else 120) * high) ** 0.5, rtol=1e-10, atol=1e-10)
    assert all(p.grad is None for p in module.parameters() if p is not scale and p is not offset)


def test_sampling_covers_what_is_listed() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {sample_setting((2, 4), granularity=("row",), generator=generator) for _ in range(100)}
    assert drawn == {ElasticSetting(b, s, "row") for b in (2, 4) for s in (True, False)}
    with pytest.raises(ValueError, match="list a choice"):
        sample_setting(())


def test_weight_distribution_loss() -> None:
    weights = [torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.rand(40, dtype=torch.float64) ** 2]
    expected = torch.zeros((), dtype=torch.float64)
    for w in weights:
        mean, n = w.sum() / w.numel(), w.numel()
        variance = ((w - mean) ** 2).sum() / n
        k, s = ((w - mean) ** 4).sum() / n / variance**2, ((w - mean) ** 3).sum() / n / variance**1.5
        expected = expected + (0.015 * (k - 1.8) ** 2 + s**2) / 2
    ours = weight_distribution_loss(weights)
    assert torch.allclose(ours, expected, rtol=1e-12)
    grads = [torch.autograd.grad(loss, weights[0])[0] for loss in (ours, expected)]
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-10)
    uniform = torch.linspace(-1, 1, 10001)
    assert float(weight_distribution_loss([uniform])) < 1e-6
    with pytest.raises(ValueError, match="at least one"):
        weight_distribution_loss([])


def test_guidance_losses_and_gradients() -> None:
    logits = [torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    target = torch.randint(5, (9,))
    p = [t.softmax(1) for t in logits]

    def teach(a: int, b: int) -> torch.Tensor:
        fixed = p[a].detach()
        return (fixed * (fixed.log() - p[b].log())).sum(1).mean()

    ce = [F.cross_entropy(t, target) for t in logits]
    expected = [ce[0], (teach(0, 1) + ce[1]) / 2, (teach(1, 2) + ce[2]) / 2]
    ours = guidance_losses(*logits, target)
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)
    pairs = zip(torch.autograd.grad(sum(ours), logits), torch.autograd.grad(sum(expected), logits), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in pairs)


def test_errors() -> None:
    with pytest.raises(ValueError, match="three times"):
        guidance_losses(torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 4), torch.tensor([0, 1]))
