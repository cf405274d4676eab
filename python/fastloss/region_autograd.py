"""The autograd.Function of regions; the rules are those of autograd.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import region_ops, region_reference  # noqa: F401  (region_ops registers what torch.ops.fastloss holds)
from .autograd import _differentiate, batched, forward_mode_active, functorch_active
from .region_statistics import region_coefficients

_ops = torch.ops.fastloss


def _forward(logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float) -> Tensor:
    return _ops.region_stats.default(logits, target, mask, want, sharpness)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, mask, ctx.want, ctx.sharpness = inputs
    ctx.save_for_backward(logits, target, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, target, mask = ctx.saved_tensors
    tail = (target, mask, ctx.want, ctx.sharpness)
    if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(grad)):

        def compose(logits: Tensor) -> tuple[Tensor]:
            return (region_reference.statistics(logits, *tail),)

        return *_differentiate(compose, (logits,), (grad,)), None, None, None, None
    d_logits = _ops.region_stats_backward.default(region_coefficients(grad), logits, *tail)
    return d_logits, None, None, None, None


class _RegionStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        out = _forward(*args)
        _setup(ctx, args, out)
        return out

    backward = staticmethod(_backward)


class _RegionStatsFunctorch(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def region_stats(logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float) -> Tensor:
    """stats [10, R] of logits [R, P], differentiable with respect to them."""
    args = (logits, target, mask, want, sharpness)
    if forward_mode_active():
        return region_reference.statistics(*args)
    function = _RegionStatsFunctorch if functorch_active() else _RegionStats
    return function.apply(*args)
