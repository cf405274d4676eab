"""The mean of values under the softmax of similarities that are never stored: what soft targets ask of a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..autograd import _differentiate
from ..pairs.arguments import Temperature

#: Numbers of the teacher's matrix that are held at a time.
_HELD = 1 << 20


def _dense(q: Tensor, k: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    logits = scale * (q @ k.t())
    return ((logits if bias is None else logits + bias).softmax(1) @ values,)


def _shares(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """The softmax of some rows at a time, all in one buffer: it is overwritten."""
    step = min(max(1, _HELD // max(k.shape[0], 1)), max(q.shape[0], 1))
    buffer = q.new_empty(step, k.shape[0])
    for start in range(0, q.shape[0], step):
        rows = slice(start, min(start + step, q.shape[0]))
        p = buffer[: rows.stop - start]
        torch.mm(q[rows], k.t(), out=p).mul_(scale)
        if bias is not None:
            p.add_(bias)
        p.sub_(p.amax(1, keepdim=True)).exp_()
        yield rows, p.div_(p.sum(1, keepdim=True))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        out = values.new_empty(q.shape[0], values.shape[1])
        for rows, p in _shares(q, k, scale, bias):
            torch.mm(p, values, out=out[rows])
        ctx.save_for_backward(q, k, values, scale, bias, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, values, scale, bias, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _differentiate(
                lambda q, k, values, scale: _dense(q, k, values, scale, bias), (q, k, values, scale), (grad,)
            )
            return *found, None
        teacher = any(ctx.needs_input_grad[i] for i in (0, 1, 3))
        dq, dk, dvalues = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(values)
        for rows, p in _shares(q, k, scale, bias):
            g = grad[rows]
            dvalues.addmm_(p.t(), g)
            if teacher:
                slope = (g @ values.t()).sub_((g * out[rows]).sum(1, keepdim=True)).mul_(p).mul_(scale)
                dq[rows] = slope @ k
                dk.addmm_(slope.t(), q[rows])
        dscale = (dq * q).sum() / scale
        made = (dq, dk, dvalues, dscale)
        return *(x if needed else None for x, needed in zip(made, ctx.needs_input_grad, strict=False)), None


def attention(q: Tensor, k: Tensor, values: Tensor, scale: Temperature, bias: Tensor | None = None) -> Tensor:
    """sum_j softmax_j(scale <q_i, k_j> + bias_j) values_j, [M, D]; the bias is without gradient.

    A few rows of the softmax are held at a time and made again in the backward: memory O(M D) and some megabytes. What is
    differentiated twice comes from the whole matrix.
    """
    number = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=q.dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        return _Attention.apply(q, k, values, number.to(q.dtype), None if bias is None else bias.detach())
