"""The pointwise ops in plain PyTorch: what runs where no kernel does, and what kernels are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .contract import Pointwise
from .reference import accumulator
from .registry import kernel


def _like(weight: Tensor | None, input: Tensor) -> Tensor | float:
    """The weight of each element; `weight` is repeated as often as it takes."""
    if weight is None:
        return 1.0
    return accumulator(weight).reshape(-1).repeat(input.numel() // max(1, weight.numel())).reshape(input.shape)


def _slope(input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: int) -> Tensor:
    """The derivative of each element's loss in its input."""
    x, t = accumulator(input), accumulator(labels)
    if kind == Pointwise.KL_DIV:
        return -t
    if kind == Pointwise.KL_DIV_LOG_TARGET:
        return -t.exp()
    p = _like(pos_weight, input)
    part = (1 + (p - 1) * t) * torch.sigmoid(-x.abs())
    return torch.where(x < 0, part - p * t, (1 - t) - part) * _like(weight, input)


def _values(input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: int) -> Tensor:
    """Each element's loss."""
    x, t = accumulator(input), accumulator(labels)
    if kind == Pointwise.KL_DIV:
        return t * (torch.where(t == 0, t, t.log()) - x)
    if kind == Pointwise.KL_DIV_LOG_TARGET:
        return t.exp() * (t - x)
    p = _like(pos_weight, input)
    value = torch.where(x < 0, -p * t, 1 - t) * x + (1 + (p - 1) * t) * torch.exp(-x.abs()).log1p()
    return torch.where(x == -math.inf, math.nan, value) * _like(weight, input)


@kernel("pointwise_loss", "reference")
def pointwise_loss(
    input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: int, share: float,
    reduce: bool, gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    values = _values(input, labels, weight, pos_weight, kind)
    loss = values.sum() * share if reduce else values.to(torch.promote_types(input.dtype, labels.dtype))
    loss = loss.to(accumulator(input).dtype) if reduce else loss.contiguous()
    if not gradient:
        return loss, input.new_empty(0)
    return loss, (_slope(input, labels, weight, pos_weight, kind) * share).to(input.dtype).contiguous()


@kernel("pointwise_loss_backward", "reference")
def pointwise_loss_backward(
    upstream: Tensor, input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: int,
    share: float,
) -> Tensor:  # fmt: skip
    factor = accumulator(upstream) * share
    return (_slope(input, labels, weight, pos_weight, kind) * factor).to(input.dtype).contiguous()


@kernel("pointwise_loss_backward_unless_one_", "reference")
def pointwise_loss_backward_unless_one_(
    dinput: Tensor, upstream: Tensor, input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None,
    kind: int, share: float,
) -> None:  # fmt: skip
    """pointwise_loss_backward into dinput, unless upstream, one number, is 1: then it is there already."""
    again = pointwise_loss_backward(upstream, input, labels, weight, pos_weight, kind, share)
    dinput.copy_(torch.where(upstream == 1, dinput, again))
