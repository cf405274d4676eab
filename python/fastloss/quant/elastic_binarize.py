"""Binary and ternary activations with a learned scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..autograd import forward_mode_active, functorch_active
from . import reference_quant
from .binarize import of_parameter
from .contract import Grad, Pack, Surrogate
from .fake_quant import Levels, _factor, fake_quant, quantised
from .layout import Layout, check_parameter, layout_of, rows_of
from .lowbit_matmul import again
from .ops import wide

_ops = torch.ops.fastloss
#: The smallest scale.
_SMALLEST = 1e-5


def at_least(scale: Tensor, smallest: float = _SMALLEST) -> Tensor:
    """The scale, no smaller than this, with the gradient of the identity."""
    return scale + (scale.detach().clamp(min=smallest) - scale.detach())


class _Signed(torch.autograd.Function):
    """y = scale sign(x); dx = g where |x| <= scale; dscale = factor sum g sign(x). Saves two bits an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, layout: Layout, factor: float) -> Tensor:
        flat = rows_of(x)
        column = scale.reshape(-1, 1)
        signs = _ops.pack_bits.default(flat, int(Pack.SIGN), None, None, 0, 0, 1)[0]
        outside = _ops.pack_bits.default(flat, int(Pack.TERNARY), None, column, 0, 0, 2)[0][0]
        y = _ops.unpack_bits.default(signs, flat.shape[1], [2], -1, column, 0, wide(x))
        ctx.save_for_backward(signs if ctx.needs_input_grad[1] else None, ~outside, scale)
        ctx.layout, ctx.factor, ctx.shape = layout, factor, x.shape
        return y.to(x.dtype).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        signs, mask, scale = ctx.saved_tensors
        dx = dscale = None
        flat = rows_of(grad)
        if ctx.needs_input_grad[0]:
            run = reference_quant.binarize_backward if again(grad) else _ops.binarize_backward.default
            kind = (int(Surrogate.CLIP), 1.0, 0.0, int(Grad.X))
            dx = run(flat, None, None, mask, None, None, None, 1, 1, *kind)[0].reshape(ctx.shape)
        if signs is not None:
            s = _ops.unpack_bits.default(signs, flat.shape[1], [2], -1, None, 0, wide(grad))
            sums = reference_quant.group_sums(flat.to(s.dtype) * s, *ctx.layout)
            dscale = of_parameter(sums, scale) * ctx.factor
        return dx, dscale, None, None


def _composed(x: Tensor, scale: Tensor, layout: Layout, factor: float) -> Tensor:
    """`_Signed` in PyTorch operations that torch.func takes."""
    moving = x.to(wide(x))
    at = moving.detach()
    size = torch.as_tensor(reference_quant.spread(scale, x, *layout, 1.0))
    step = size.detach() + factor * (size - size.detach())
    moved = torch.where(at.abs() > size.detach(), 0.0, (moving - at).nan_to_num(0.0))  # inf - inf
    return (torch.where(at >= 0, step, -step) + moved).to(x.dtype)


def elastic_scale(x: Tensor, bits: int = 1, *, signed: bool = True, dim: int | None = None) -> Tensor:
    """The scale to start from, [1] or [x.shape[0]]: 2 mean |x| / sqrt(Qp), or 4 mean |x| / sqrt(Qp) unsigned, with Qp =
    max(1, 2^(bits - 1) - 1), or 2^bits - 1."""
    largest = max(1, 2 ** (bits - 1) - 1) if signed else 2**bits - 1
    size = x.detach().to(wide(x)).abs()
    mean = size.mean().reshape(1) if dim is None else size.flatten(1).mean(1)
    return (2 if signed else 4) * mean / math.sqrt(largest)


def elastic_binarize(
    x: Tensor, scale: Tensor, bits: int = 1, *, signed: bool = True, dim: int | None = None,
    grad_factor: str | float | None = "lsq",
) -> Tensor:  # fmt: skip
    """x on 2 or 3 levels with a learned scale.

    | bits | signed | y | dscale / f |
    |---|---|---|---|
    | 1 | yes | scale sign(x) | sum g sign(x) |
    | 2 | yes | scale q, q = clamp(round(x / scale), -1, 1) | sum g (q - x / scale inside, else q) |
    | 1 | no | scale q, q = clamp(round(x / scale), 0, 1) | the same |
    | 2 | no | scale q + m, q = clamp(round((x - m) / scale), 0, 2), m = min x, a constant | the same |

    dx = g inside, -1 <= x / scale <= 1 (signed), 0 <= x / scale <= 1 or 0 <= (x - m) / scale <= 2, else 0.

    Args:
        x: any shape; float32, float16, bfloat16 (float64 by PyTorch operations). sign(0) = +1.
        scale: 1 number, or x.shape[0]; taken as 1e-5 where it is less, with its gradient. `elastic_scale` gives a start.
        bits: 1 or 2. signed: for inputs of both signs; else for those of a ReLU or a softmax.
        dim: None: one scale; 0: one for each index of the first dimension (weights).
        grad_factor: f; "lsq": 1 / sqrt(numbers that share a scale * Qp), Qp the largest q; None: 1; or a number.

    "Binary and Ternary Natural Language Generation". One signed bit saves two bits an element, the others x. Raises
    ValueError and TypeError.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if bits not in (1, 2):
        raise ValueError(f"bits must be 1 or 2, got {bits}")
    if dim not in (None, 0) or (dim == 0 and x.dim() < 2):
        raise ValueError(f"dim must be None, or 0 for an x of rows, got {dim} and shape {list(x.shape)}")
    scale = at_least(scale)
    if signed == (bits == 2):
        return fake_quant(x, scale, bits=1, signed=signed, dim=dim, grad_factor=grad_factor)
    layout = layout_of(x, dim)
    scale = check_parameter("scale", scale, layout, x)  # type: ignore[assignment]
    sharing = x.numel() // max(1, scale.numel())
    if signed:
        run = _composed if functorch_active() or forward_mode_active() else _Signed.apply
        factor = _factor(grad_factor, sharing, 1.0)
        if dim == 0 and scale.numel() > 1 and x.dim() > 2:
            x2 = x.flatten(1)
            return run(x2, scale, layout_of(x2, 0), factor).reshape(x.shape)
        return run(x, scale, layout, factor)
    numbers = x.detach().to(wide(x))
    least = numbers.amin().reshape(1) if x.numel() else numbers.new_zeros(1)
    return quantised(
        x, scale, least, None, layout, Levels(0.0, 2.0, 1.0, 0.0, False), _factor(grad_factor, sharing, 2.0)
    )
