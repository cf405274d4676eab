"""NT-Xent, DCL, DCLW, MACL, HCL against their dense formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_checks import NEG, agree, agree_in, cosines, leaves
from fastloss.contrastive import (
    DCLLoss,
    HCLLoss,
    MACLLoss,
    NTXentLoss,
    dcl_loss,
    hcl_loss,
    macl_loss,
    ntxent_loss,
)


def logits(a: Tensor, b: Tensor, temperature, cosine: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(z [2B, 2B], positive column of each row, bool of the negatives)"""
    x = torch.cat((a, b))
    n = len(a)
    z = (cosines(x, x) if cosine else x @ x.t()) / temperature
    positive = (torch.arange(2 * n) + n) % (2 * n)
    negative = ~torch.eye(2 * n, dtype=torch.bool)
    negative[torch.arange(2 * n), positive] = False
    return z, positive, negative


def dense_ntxent(a, b, temperature, bank=None, valid=None, cosine=True):
    z, positive, _ = logits(a, b, temperature, cosine)
    z = z.masked_fill(torch.eye(len(z), dtype=torch.bool), NEG)
    if bank is not None:
        x = torch.cat((a, b))
        more = (cosines(x, bank) if cosine else x @ bank.t()) / temperature
        z = torch.cat((z, more if valid is None else more[:, valid]), 1)
    return F.cross_entropy(z, positive, reduction="none")


@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize("normalize", [True, False])
def test_ntxent(batch, normalize):
    a, b = leaves((batch, 8), (batch, 8))
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    ours = ntxent_loss(a, b, tau, normalize=normalize, reduction="none")
    agree(ours, dense_ntxent(a, b, tau, cosine=normalize), (a, b, tau))


@pytest.mark.parametrize("filled", [0, 3, 7])
def test_ntxent_with_a_bank_half_filled(filled):
    a, b = leaves((5, 8), (5, 8))
    bank = torch.randn(7, 8, dtype=torch.float64)
    valid = torch.arange(7) < filled
    dense = dense_ntxent(a, b, 0.5, bank, valid).mean()
    bank[~valid] = float("nan")  # what is not filled may hold anything
    agree(ntxent_loss(a, b, 0.5, bank=bank, bank_valid=valid), dense, (a, b))


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_ntxent_of_duplicates_at_all_scales(temperature):
    a, b = leaves((6, 8), (6, 8))
    with torch.no_grad():
        a[1], b[1], a[4] = a[0], b[0], b[3]
    agree(ntxent_loss(a, b, temperature), dense_ntxent(a, b, temperature).mean(), (a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ntxent_in_low_precision(dtype):
    inputs = leaves((32, 16), (32, 16))
    agree_in(dtype, lambda a, b: ntxent_loss(a, b, 0.5), lambda a, b: dense_ntxent(a, b, 0.5).mean(), inputs)


def dense_dcl(a, b, temperature, weighted, sigma, within):
    z, positive, negative = logits(a, b, temperature)
    n = len(a)
    if not within:
        block = torch.arange(2 * n) // n
        negative = negative & (block[:, None] != block[None, :])
    own = z[torch.arange(2 * n), positive]
    weight = torch.ones_like(own)
    if weighted:
        weight = (2 - n * torch.softmax(own[:n].detach() * temperature / sigma, 0)).repeat(2)
    return torch.logsumexp(z.masked_fill(~negative, NEG), 1) - weight * own


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_dcl(weighted, within):
    a, b = leaves((9, 8), (9, 8))
    ours = dcl_loss(a, b, 0.1, weighted=weighted, within=within, reduction="none")
    agree(ours, dense_dcl(a, b, 0.1, weighted, 0.5, within), (a, b))


def test_dcl_in_low_precision():
    inputs = leaves((32, 16), (32, 16))
    for dtype in (torch.float32, torch.bfloat16):
        agree_in(dtype, lambda a, b: dcl_loss(a, b), lambda a, b: dense_dcl(a, b, 0.1, False, 0.5, True).mean(), inputs)


def dense_hcl(a, b, temperature, beta, tau_plus):
    z, positive, negative = logits(a, b, temperature)
    own = z[torch.arange(len(z)), positive].exp()
    e = torch.where(negative, z.exp(), 0.0)
    count = len(z) - 2
    importance = torch.where(negative, (beta * z).exp(), 0.0)
    weighted = (importance * e).sum(1) / (importance.sum(1) / count)
    total = (weighted - tau_plus * count * own) / (1 - tau_plus)
    if tau_plus:
        total = total.clamp(min=count * math.exp(-1 / temperature))
    return -(own / (own + total)).log()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.6])
def test_hcl(beta, tau_plus):
    a, b = leaves((9, 4), (9, 4))
    with torch.no_grad():
        b[:5] = a[:5] + 0.01 * b[:5]  # positives so close that the floor holds
    ours = hcl_loss(a, b, 0.5, beta=beta, tau_plus=tau_plus, reduction="none")
    agree(ours, dense_hcl(a, b, 0.5, beta, tau_plus), (a, b))


def test_hcl_at_its_floor():
    """Opposite negatives and a positive between: the corrected sum is positive, but below its floor."""
    angle = torch.tensor([[0.0, math.pi], [2 * math.pi / 3, math.pi]], dtype=torch.float64)
    a, b = (torch.stack((x.cos(), x.sin()), 1).requires_grad_() for x in angle)
    agree(hcl_loss(a, b, 0.5, reduction="none"), dense_hcl(a, b, 0.5, 1.0, 0.1), (a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hcl_in_low_precision(dtype):
    inputs = leaves((32, 16), (32, 16))
    agree_in(dtype, lambda a, b: hcl_loss(a, b), lambda a, b: dense_hcl(a, b, 0.5, 1.0, 0.1).mean(), inputs)


def test_hcl_at_a_low_temperature_is_finite():
    a, b = leaves((6, 8), (6, 8), dtype=torch.float32)
    loss = hcl_loss(a, b, 0.01)
    grads = torch.autograd.grad(loss, (a, b))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)


def test_macl():
    a, b = leaves((9, 8), (9, 8))
    tau, alpha = 0.1, 0.5
    z, positive, _ = logits(a, b, 1.0)
    alignment = z[torch.arange(18), positive].mean().detach()
    z = z.masked_fill(torch.eye(18, dtype=torch.bool), NEG) / (tau * (1 + alpha * (alignment - 0.1)))
    nll = F.cross_entropy(z, positive, reduction="none")
    weight = 1 / (1 - (-nll).exp() + 1e-8)
    ours = macl_loss(a, b, tau, alpha=alpha, target_alignment=0.1, reduction="none")
    agree(ours, weight.detach() * nll, (a, b))


def test_modules_hold_the_published_defaults():
    a, b = leaves((5, 8), (5, 8))
    for module, value in (
        (NTXentLoss(), ntxent_loss(a, b, 0.5)),
        (DCLLoss(), dcl_loss(a, b, 0.1)),
        (DCLLoss(weighted=True), dcl_loss(a, b, 0.1, weighted=True, sigma=0.5)),
        (HCLLoss(), hcl_loss(a, b, 0.5, beta=1.0, tau_plus=0.1)),
        (MACLLoss(), macl_loss(a, b, 0.1, alpha=0.5)),
    ):
        assert torch.equal(module(a, b), value)
        assert "temperature" in repr(module)


@pytest.mark.parametrize("loss", [ntxent_loss, dcl_loss, macl_loss, hcl_loss])
def test_bad_input(loss):
    a = torch.randn(4, 8)
    with pytest.raises(ValueError, match="one shape"):
        loss(a, a[:3])
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature must be"):
            loss(a, a, temperature)
    with pytest.raises(ValueError, match="reduction"):
        loss(a, a, reduction="median")


def test_bad_options():
    a = torch.randn(4, 8)
    for call, message in (
        (lambda: dcl_loss(a, a, weighted=True, sigma=0.0), "sigma must be"),
        (lambda: hcl_loss(a, a, beta=-1.0), "beta must be"),
        (lambda: hcl_loss(a, a, tau_plus=1.0), "tau_plus must be"),
        (lambda: hcl_loss(a[:1], a[:1]), "two samples"),
        (lambda: macl_loss(a, a, alpha=2.0), "alpha must be"),
        (lambda: ntxent_loss(a[:0], a[:0]), "no rows"),
        (lambda: ntxent_loss(a, a, bank=a, bank_valid=torch.ones(3, dtype=torch.bool)), "column_valid"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
