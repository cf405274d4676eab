"""Dual temperature, the hardest quantile, N-pairs against their dense formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_checks import NEG, agree, agree_in, cosines, leaves
from fastloss.contrastive import (
    DualTemperatureLoss,
    dual_temperature_loss,
    hard_quantile_loss,
    n_pairs_loss,
    reweighted,
)
from fastloss.contrastive.reweighted import TOPK_LIMIT


def dense_dual(q, k, temperature=0.1, dt_m=10.0):
    z, own = cosines(q, k) / temperature, torch.arange(len(q))
    inter = F.log_softmax(z / dt_m, 1)[own, own]
    intra = F.log_softmax(z, 1)[own, own]
    weight = (1 - inter.exp()) / (1 - intra.exp())
    return weight.detach() * -intra


@pytest.mark.parametrize("batch", [2, 17])
def test_dual_temperature(batch):
    q, k = leaves((batch, 8), (batch, 8))
    agree(dual_temperature_loss(q, k, reduction="none"), dense_dual(q, k), (q, k))
    agree(DualTemperatureLoss()(q, k), dense_dual(q, k).mean(), (q, k))


def test_dual_temperature_of_solved_rows():
    """Where p is 1 to rounding, the weight is large and the loss small: their product has a limit."""
    q = torch.eye(4, dtype=torch.float64).requires_grad_()
    k = (torch.eye(4, dtype=torch.float64) - 0.2).requires_grad_()
    for temperature in (0.1, 0.02, 0.001):
        loss = dual_temperature_loss(q.float(), k.float(), temperature, reduction="none")
        z = cosines(q, k) / temperature
        x = torch.logsumexp(z.masked_fill(torch.eye(4, dtype=torch.bool), NEG), 1) - z.diagonal()
        inter = z / 10
        slope = torch.sigmoid(
            torch.logsumexp(inter.masked_fill(torch.eye(4, dtype=torch.bool), NEG), 1) - inter.diagonal()
        ).detach()
        right = slope * torch.where(
            x < -30, 1 + (x - x.detach()), F.softplus(x.clamp(min=-30)) / torch.sigmoid(x.clamp(min=-30)).detach()
        )
        torch.testing.assert_close(loss.double(), right, rtol=2e-4, atol=1e-9)
        gradient = torch.autograd.grad(loss.sum(), q)[0]
        torch.testing.assert_close(gradient, torch.autograd.grad(right.sum(), q)[0], rtol=5e-3, atol=1e-5)


def test_one_row_has_no_loss():
    q, k = leaves((1, 8), (1, 8))
    loss = dual_temperature_loss(q, k)
    assert loss == 0 and torch.autograd.grad(loss, q)[0].abs().max() == 0
    assert hard_quantile_loss(q, k) == 0


def test_dual_temperature_in_low_precision():
    inputs = leaves((32, 16), (32, 16))
    for dtype in (torch.float32, torch.bfloat16):
        agree_in(dtype, dual_temperature_loss, lambda q, k: dense_dual(q, k).mean(), inputs)


def dense_quantile(q, k, temperature, count):
    s = cosines(q, k)
    eye = torch.eye(len(q), dtype=torch.bool)
    edge = s.masked_fill(eye, NEG).topk(count, 1).values[:, -1:]
    z = (s / temperature).masked_fill(~eye & (s < edge), NEG)
    return F.cross_entropy(z, torch.arange(len(q)), reduction="none")


@pytest.mark.parametrize(("batch", "fraction"), [(2, 0.5), (20, 0.01), (20, 0.25), (20, 1.0), (150, 0.45), (150, 0.9)])
def test_hard_quantile(batch, fraction):
    """Both ways of finding the threshold: few listed, many selected."""
    q, k = leaves((batch, 8), (batch, 8))
    count = max(1, math.ceil(fraction * (batch - 1)))
    assert (count > TOPK_LIMIT) == (batch == 150 or fraction == 1.0)
    agree(hard_quantile_loss(q, k, fraction=fraction, reduction="none"), dense_quantile(q, k, 0.07, count), (q, k))


class Sweeps(TorchDispatchMode):
    """Counts the kernels over all pairs."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == "fastloss"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("normalize", [False, True])
def test_hard_quantile_in_blocks_of_rows(monkeypatch, normalize):
    q, k = (x.detach() for x in leaves((150, 8), (150, 8)))
    monkeypatch.setattr(reweighted, "_HELD", 150 * 7)
    threshold = reweighted.negative_threshold(q, k, 60, normalize)
    z = (cosines(q, k) if normalize else q @ k.t()).fill_diagonal_(NEG)
    assert ((z > threshold[:, None]).sum(1) == 60).all()


def test_hard_quantile_sweeps_once():
    q, k = (x.detach() for x in leaves((200, 8), (200, 8)))
    with Sweeps() as sweeps:
        hard_quantile_loss(q, k, fraction=0.4)
    assert sweeps.count == 1


def test_hard_quantile_keeps_equal_negatives():
    q, k = leaves((12, 8), (12, 8))
    with torch.no_grad():
        k[3:9] = k[3]
    loss = hard_quantile_loss(q, k, fraction=0.2, reduction="none")
    assert loss.isfinite().all() and (loss > 0).all()


def test_hard_quantile_in_float32():
    inputs = leaves((100, 16), (100, 16))
    for fraction in (0.1, 0.8):
        count = math.ceil(fraction * 99)
        agree_in(
            torch.float32,
            lambda q, k, f=fraction: hard_quantile_loss(q, k, fraction=f),
            lambda q, k, c=count: dense_quantile(q, k, 0.07, c).mean(),
            inputs,
        )


def test_n_pairs():
    f, g = leaves((11, 8), (11, 8))
    z = f @ g.t()
    norms = f.square().sum(1) + g.square().sum(1)
    dense = F.cross_entropy(z, torch.arange(11), reduction="none") + 0.002 / 4 * norms
    agree(n_pairs_loss(f, g, reduction="none"), dense, (f, g))


def test_bad_input():
    a = torch.randn(4, 8)
    for call, message in (
        (lambda: dual_temperature_loss(a, a[:3]), "one shape"),
        (lambda: dual_temperature_loss(a, a, 0.0), "temperature must be"),
        (lambda: dual_temperature_loss(a, a, dt_m=-1.0), "dt_m must be"),
        (lambda: hard_quantile_loss(a, a, fraction=0.0), "fraction must be"),
        (lambda: hard_quantile_loss(a, a, -0.1), "temperature must be"),
        (lambda: n_pairs_loss(a, a, norm_weight=-1.0), "norm_weight must be"),
        (lambda: n_pairs_loss(a, a[:, :3]), "one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
