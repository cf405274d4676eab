"""The statistics of `SphericalLinear` as an autograd Function whose backward keeps what the next step needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .factors import Gradient

if TYPE_CHECKING:
    from .layer import SphericalLinear


class Statistics(torch.autograd.Function):
    """(scores of the listed classes [m, K], sums [m], centred sums of squares [m]); `leaf` is there in training."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, leaf: Tensor | None, target: Tensor, layer: SphericalLinear
    ) -> tuple[Tensor, Tensor, Tensor]:
        counts = target != layer.ignore_index
        classes = torch.where(counts, target, 0)
        scores, total, centred = layer.factors.statistics(layer.extended(input), classes)
        any_counts = counts.any(1)
        ctx.save_for_backward(input, classes, counts)
        ctx.layer, ctx.stamp, ctx.trains, ctx.done = layer, layer.stamp(), leaf is not None, False
        return (
            torch.where(counts, scores, 0.0),
            torch.where(any_counts, total, 0.0),
            torch.where(any_counts, centred, 0.0),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        layer: SphericalLinear = ctx.layer
        if ctx.trains and ctx.done:
            raise RuntimeError("a second backward pass through one forward of SphericalLinear would count it twice")
        if ctx.stamp != layer.stamp():
            raise RuntimeError(
                "the weights of SphericalLinear changed between this forward and its backward (a step(), load_state_dict() "
                "or another change): the gradient would be of other weights than the loss"
            )
        if ctx.trains and len(layer.pending) >= layer.accumulate:
            raise RuntimeError(
                f"one backward pass too many: accumulate={layer.accumulate} before each step() or discard()"
            )
        input, classes, counts = ctx.saved_tensors
        any_counts = counts.any(1)
        own, total, centred = upstream
        x = torch.where(any_counts[:, None], layer.extended(input), 0.0)  # whatever stands in ignored rows
        gradient = Gradient(
            x, classes, torch.where(counts, own, 0.0), torch.where(any_counts, total, 0.0),
            torch.where(any_counts, centred, 0.0),
        )  # fmt: skip
        needed = None
        if ctx.needs_input_grad[0]:
            needed = layer.factors.input_gradient(gradient)[:, : layer.in_features].to(input.dtype)
        if ctx.trains:
            layer.pending.append(gradient)
            ctx.done = True
        return needed, None, None, None
