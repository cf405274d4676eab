"""Losses as modules: what is trained of their options, and which options they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastloss.contrastive as c


@pytest.mark.parametrize("loss", [c.NTXentLoss, c.DCLLoss, c.InfoNCELoss, c.SoftClipLoss, c.MWLoss])
def test_a_parameter_among_the_options_is_trained(loss):
    number = nn.Parameter(torch.tensor(0.7))
    criterion = loss(number)
    assert [id(p) for p in criterion.parameters()] == [id(number)]
    q, k = torch.randn(2, 6, 4)
    criterion(q, k).backward()
    assert number.grad is not None and number.grad != 0
    other = copy.deepcopy(criterion).double()
    assert next(other.parameters()).dtype == torch.float64 and number.dtype == torch.float32
    other.load_state_dict({name: torch.tensor(0.3) for name in criterion.state_dict()})
    assert torch.equal(other(q, k), loss(0.3)(q, k)) or torch.allclose(other(q, k).float(), loss(0.3)(q, k))


def test_options_that_are_refused():
    q, k, ids = torch.randn(5, 4), torch.randn(7, 4), torch.arange(5)
    for top in (
        torch.tensor([0] * 5),
        torch.full((5,), 7),
        torch.tensor(99),
        0,
        7,
        99.0,
        float("nan"),
        torch.tensor(float("nan")),
    ):
        with pytest.raises(ValueError, match="top must be above 0 and below 7, the number of labels, got"):
            c.soft_topk_loss(q, k, ids, ids, top=top)
    with pytest.raises(ValueError, match=r"top must be a number, or a tensor \[\] or \[5\]; got \[4\]"):
        c.soft_topk_loss(q, k, ids, ids, top=torch.ones(4, dtype=torch.int64))
    for top in (True, torch.ones(5, dtype=torch.bool), "2"):
        with pytest.raises(TypeError, match="top must be a number or a tensor"):
            c.soft_topk_loss(q, k, ids, ids, top=top)
    for loss in (c.decoupled_softmax_loss, c.soft_topk_loss):
        for weight in (-1.0, float("nan")):
            with pytest.raises(ValueError, match=f"weight must be >= 0, got {weight}"):
                loss(q, k, ids, ids, weight=torch.tensor([1.0, 1.0, weight, 1.0, 1.0]))
    for number in (1.5, -0.5, float("nan")):
        share = torch.tensor([0.5, 0.5, number, 0.5, 0.5])
        with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got"):
            c.mixup_info_nce_loss(q, q, ids, share)
        with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got"):
            c.metrix_loss(q, q, q, share)
        with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got"):
            c.metrix_loss(q, q, q, number)
    with pytest.raises(ValueError, match="same_label must be positive or exclude, got 'x'"):
        c.MoCoLoss(4, 8, same_label="x")
    with pytest.raises(TypeError, match=r"dtype must be floating, got torch\.int64"):
        c.Queue(8, 4, dtype=torch.int64)
