"""Scales, temperatures and counts that are not positive are refused where they are given, by name."""

from __future__ import annotations

import pytest
import torch

import fastloss.contrastive as c
from fastloss.compat import lightly
from fastloss.compat import pytorch_metric_learning as pml

IDS = torch.arange(3)
CALLS = {
    "tau": lambda x: c.pamc_loss(torch.randn(3, 4), IDS, IDS, torch.ones(3), IDS, 3, tau=x),
    "eps": lambda x: c.pamc_loss(torch.randn(3, 4), IDS, IDS, torch.ones(3), IDS, 3, eps=x),
    "scale of MW": lambda x: c.MWLoss(x),
    "scale of SoftClip": lambda x: c.SoftClipLoss(x),
    "mixup_scale": lambda x: c.M3CoLLoss(mixup_scale=x),
    "soft_scale": lambda x: c.M3CoLLoss(soft_scale=x),
    "scale of AngularMargin": lambda x: c.AngularMarginLoss(4, 5, scale=x),
    "sigma": lambda x: lightly.DCLWLoss(sigma=x),
    "temperature of NTXent": lambda x: pml.NTXentLoss(x),
    "temperature of SupCon": lambda x: pml.SupConLoss(x),
}


@pytest.mark.parametrize("value", [0.0, -2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", CALLS)
def test_positive(name, value):
    with pytest.raises(ValueError, match=f"{name.split()[0]} must be finite and > 0, got {value}"):
        CALLS[name](value)
    CALLS[name](1.5)


def test_other_options():
    for bins in (0, 1, 2.5):
        with pytest.raises(ValueError, match=f"bins must be an integer >= 2, got {bins}"):
            c.MWLoss(bins=bins)
    with pytest.raises(ValueError, match="mode must be 'query' or 'pooled', got 'row'"):
        c.MWLoss(mode="row")
    for name in ("margin", "width"):
        with pytest.raises(ValueError, match=f"{name} must be finite and >= 0, got -1"):
            c.AngularMarginLoss(4, 5, **{name: -1.0})
