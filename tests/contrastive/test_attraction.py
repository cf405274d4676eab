"""CACR and AMCL against their dense formulas."""

from __future__ import annotations

import math

import pytest
import torch

from contrastive_checks import NEG, agree, agree_in, leaves
from fastloss.contrastive import AdaptiveTemperature, AMCLLoss, CACRLoss, amcl_loss, cacr_loss


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def dense_cacr(
    views, tau_positive=1.0, tau_negative=1.0, alpha=1.0, beta=1.0, tau_plus=0.0, rbf=None, detach=False, normalize=True
):
    views = [unit(v) for v in views] if normalize else views
    b = len(views[0])
    eye = torch.eye(b, dtype=torch.bool)
    attracted, repelled = [], []
    for i, x in enumerate(views):
        d = torch.stack([(x - y).square().sum(1) for j, y in enumerate(views) if j != i], 1)
        w = torch.softmax(tau_positive * d, 1)
        attracted.append(((w.detach() if detach else w) * alpha * d).sum(1).mean())
        for y in views[i + 1 :]:
            d = (x[:, None] - y[None]).square().sum(2)
            w = torch.softmax((-tau_negative * d).masked_fill(eye, NEG), 1)
            w = w.detach() if detach else w
            if rbf is not None:
                repelled.append(beta * (w * (-rbf * d).exp()).sum(1).mean().log())
                continue
            r = (w * -beta * d).sum(1)
            if tau_plus:
                r = (r + tau_plus * beta * d.diagonal()) / (1 - tau_plus)
            repelled.append(r.mean())
    return sum(attracted) / len(attracted) + sum(repelled) / len(repelled)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tau_positive": 0.5, "tau_negative": 3.0, "alpha": 2.0, "beta": 0.7},
        {"tau_plus": 0.1},
        {"rbf": 2.0, "tau_negative": 0.5, "beta": 3.0},
    ],
)
def test_cacr(count, normalize, options):
    views = leaves(*[(7, 5)] * count)
    agree(cacr_loss(views, normalize=normalize, **options), dense_cacr(views, normalize=normalize, **options), views)


def test_cacr_with_fixed_weights():
    views = leaves((7, 5), (7, 5), (7, 5))
    agree(cacr_loss(views, detach_weights=True), dense_cacr(views, detach=True), views)


def test_cacr_of_duplicates_in_low_precision():
    inputs = leaves((24, 16), (24, 16))
    with torch.no_grad():
        inputs[0][3] = inputs[0][2]
        inputs[1][3] = inputs[1][2]
    for dtype in (torch.float32, torch.bfloat16):
        agree_in(dtype, lambda *v: cacr_loss(v), lambda *v: dense_cacr(v), inputs)


def test_cacr_module():
    views = leaves((7, 5), (7, 5))
    assert torch.equal(CACRLoss()(views), cacr_loss(views, tau_positive=1.0, tau_negative=1.0, alpha=1.0, beta=1.0))


def dense_amcl(view1, view2, temperature, beta=0.1):
    b, heads, dim = view1.shape
    total = 0
    for c in range(heads):
        x = unit(torch.cat((view1[:, c], view2[:, c])))
        s = x @ x.t()
        negative = (torch.arange(2 * b)[:, None] - torch.arange(2 * b)[None]) % b != 0
        partner = (torch.arange(2 * b) + b) % (2 * b)
        hardest = s.masked_fill(~negative, NEG).argmax(1)
        tau_p, tau_n = temperature(x, x[partner]), temperature(x, x[hardest])

        def omega(t, dim=dim):
            return dim / 2 * torch.log(t) + 1 / t

        rows = torch.arange(2 * b)
        total = total - s[rows, partner] / tau_p + s[rows, hardest] / tau_n + beta * (omega(tau_p) - omega(tau_n))
    return total


@pytest.mark.parametrize("heads", [1, 3])
def test_amcl(heads):
    view1, view2 = leaves((6, heads, 8), (6, heads, 8))
    temperature = AdaptiveTemperature(8, 16).double()
    inputs = (view1, view2, *temperature.parameters())
    ours = amcl_loss(view1, view2, temperature, reduction="none")
    agree(ours, dense_amcl(view1, view2, temperature), inputs)


def test_amcl_module():
    criterion = AMCLLoss(8).double()
    view1, view2 = leaves((6, 3, 8), (6, 3, 8))
    agree(criterion(view1, view2), dense_amcl(view1, view2, criterion.temperature).mean(), (view1, view2))
    tau = criterion.temperature(unit(view1[:, 0]), unit(view2[:, 0]))
    assert ((tau > 1e-5) & (tau < 2)).all() and criterion.beta == 0.1


def test_amcl_in_float32():
    temperature = AdaptiveTemperature(16, 16)

    def network(a, b):
        return temperature.to(a.dtype)(a, b)

    inputs = leaves((12, 2, 16), (12, 2, 16))
    agree_in(
        torch.float32,
        lambda a, b: amcl_loss(a, b, network),
        lambda a, b: dense_amcl(a, b, network).mean(),
        inputs,
        k=16,
    )


def test_bad_input():
    x, h = torch.randn(4, 8), torch.randn(4, 2, 8)
    for call, message in (
        (lambda: cacr_loss([x]), "two or more"),
        (lambda: cacr_loss([x, x[:3]]), "two or more"),
        (lambda: cacr_loss([x[:1], x[:1]]), "B >= 2"),
        (lambda: cacr_loss([x, x], tau_negative=0.0), "tau_negative must be"),
        (lambda: cacr_loss([x, x], tau_positive=-math.inf), "tau_positive must be"),
        (lambda: cacr_loss([x, x], tau_plus=1.0), "tau_plus must be"),
        (lambda: cacr_loss([x, x], rbf=2.0, tau_plus=0.1), "rbf takes neither"),
        (lambda: amcl_loss(h, h[:3], AdaptiveTemperature(8)), "one shape"),
        (lambda: amcl_loss(x, x, AdaptiveTemperature(8)), "one shape"),
        (lambda: AdaptiveTemperature(8, low=0.0), "low < high"),
        (lambda: AMCLLoss(8)(h, h[:, :1]), "one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
