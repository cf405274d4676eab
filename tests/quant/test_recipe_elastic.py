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
    search_step,
    weight_distribution_loss,
)

SETTINGS = [ElasticSetting(*c) for c in itertools.product((2, 5, 8), (True, False), (True, False))]


@pytest.mark.parametrize("setting", SETTINGS)
def test_quantizer_is_the_formula(setting: ElasticSetting) -> None:
    module, x = ElasticQuantizer(6, dim=0).double(), torch.randn(6, 5, 4, dtype=torch.float64, requires_grad=True)
    module.start(x)
    name = next(n for n in module.steps if n.startswith(str(setting.bits)) and n[1] == "as"[setting.symmetric])
    name = name[:2] + ("c" if setting.per_channel else "t")
    with torch.no_grad():
        module.steps[name].mul_(-1.3)  # |step| is what counts; some numbers fall outside
    low, high = -(2.0 ** (setting.bits - 1)), 2.0 ** (setting.bits - 1) - 1
    s = module.steps[name].detach().abs().reshape(-1, 1, 1)
    beta = torch.zeros(1, 1, 1) if setting.symmetric else module.offsets[name].detach().reshape(-1, 1, 1)
    v = (x.detach() - beta) / s
    expected = v.clamp(low, high).round() * s + beta
    weight = torch.randn(6, 5, 4, dtype=torch.float64)
    y = module(x, setting)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    (y * weight).sum().backward()
    inside = (v >= low) & (v <= high)
    assert x.grad is not None and torch.allclose(x.grad, weight * inside)
    group = 20 if setting.per_channel else 120
    ds = (weight * torch.where(inside, v.round() - v, v.clamp(low, high))).reshape(6, -1).sum(1)
    ds = ds if setting.per_channel else ds.sum().reshape(1)
    grad = module.steps[name].grad
    assert grad is not None and torch.allclose(grad, -ds / (group * high) ** 0.5, rtol=1e-10, atol=1e-10)
    assert all(p.grad is None for n, p in module.steps.items() if n != name)


def test_parameters_of_each_setting() -> None:
    module = ElasticQuantizer(4)
    assert len(module.steps) == 7 * 4 and len(module.offsets) == 7 * 2


@pytest.mark.parametrize(("symmetric", "dim"), [(True, None), (False, None), (True, 1), (False, 1)])
def test_search_step_is_the_best_of_its_candidates(symmetric: bool, dim: int | None) -> None:
    x = torch.randn(7, 3, dtype=torch.float64) ** 3
    scale, offset = search_step(x, 3, symmetric=symmetric, dim=dim)
    rows = [x.flatten()] if dim is None else list(x.T)
    for r, row in enumerate(rows):
        costs = []
        for i in range(80):
            left = 1 - i * 0.01
            s = left * (row.abs().max() / 3 if symmetric else (row.max() - row.min()) / 7)
            beta = 0.0 if symmetric else left * row.min() + 4 * s
            again = ((row - beta) / s).clamp(-4, 3).round() * s + beta
            costs.append((float((row - again).abs().pow(2.4).sum()), float(s), float(beta)))
        best = min(costs, key=lambda c: c[0])
        assert abs(best[1] - float(scale[r])) < 1e-9 and abs(best[2] - float(offset[r])) < 1e-9


def test_search_step_of_zeros_and_errors() -> None:
    assert search_step(torch.zeros(4), 4)[0].tolist() == [1.0]
    with pytest.raises(ValueError, match="leave a range"):
        search_step(torch.ones(3), 4, candidates=11, shrink=0.1)
    with pytest.raises(ValueError, match=r"dim must be in \[-1, 1\), got 1"):
        search_step(torch.ones(3), 4, dim=1)
    with pytest.raises(ValueError, match="hold a number"):
        search_step(torch.ones(0), 4)
    with pytest.raises(TypeError, match="floating"):
        search_step(torch.arange(3), 4)
    with pytest.raises(ValueError, match="power must be > 0"):
        search_step(torch.ones(3), 4, power=0)


def test_sampling_covers_what_is_listed() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {sample_setting((2, 4), per_channel=(True,), generator=generator) for _ in range(100)}
    assert drawn == {ElasticSetting(b, s, True) for b in (2, 4) for s in (True, False)}
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
    module = ElasticQuantizer(4, dim=1, bits=(2, 4))
    with pytest.raises(ValueError, match=r"bits must be one of \(2, 4\), got 3"):
        module(torch.randn(2, 4), ElasticSetting(3))
    with pytest.raises(ValueError, match="4 channels in dimension 1"):
        module(torch.randn(4, 3), ElasticSetting(4))
    with pytest.raises(ValueError, match="each once"):
        ElasticQuantizer(4, bits=(2, 2))
    with pytest.raises(ValueError, match="channels must be an integer >= 1"):
        ElasticQuantizer(0)
    with pytest.raises(ValueError, match="three times"):
        guidance_losses(torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 4), torch.tensor([0, 1]))
