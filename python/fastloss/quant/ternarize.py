"""Ternarisation: -1, 0 and +1 times a scale that the numbers themselves give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import batched, forward_mode_active, functorch_active
from . import ops, reference_quant
from .binarize import along_rows, mean_magnitude, of_parameter
from .bit_tensor import BitTensor
from .bits import pack_ternary
from .contract import Grad, Pack, Surrogate
from .layout import Layout, layout_of, rows_of

_ops = torch.ops.fastloss
METHODS = ("twn", "mean43", "absmean")
#: TWN's threshold, in units of mean |x|.
_TWN = 0.7
#: BitNet's smallest scale.
_SMALLEST = 1e-5


def ternary_scale(x: Tensor, method: str, dim: int | None, center: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(scale, threshold), each [1] or [x.shape[dim]]: a number is nonzero where |x - center| > threshold."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    mean = mean_magnitude(x, dim, center)
    if method == "twn":
        threshold = _TWN * mean.detach()
        flat = along_rows(x, dim)
        size = (flat if center is None else flat - center[:, None]).abs()
        large = size > threshold[:, None]
        return torch.where(large, size, 0.0).sum(1) / large.sum(1).clamp(min=1), threshold
    scale = 4 / 3 * mean if method == "mean43" else mean.clamp(min=_SMALLEST)
    return scale, scale.detach() / 2


class _Ternarize(torch.autograd.Function):
    """y = scale t; dx = g, or g where |x - center| < scale (clip); dscale = sum g t."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, center: Tensor | None, threshold: Tensor, layout: Layout, clip: bool
    ) -> Tensor:
        flat = rows_of(x)
        per_row = [None if p is None else _of_rows(p, x, layout) for p in (center, threshold, scale)]
        planes, _ = _ops.pack_bits.default(flat, int(Pack.TERNARY), per_row[0], per_row[1], 0, 0, 2)
        outside = None
        if clip:
            outside = _ops.pack_bits.default(flat, int(Pack.TERNARY), per_row[0], per_row[2], 0, 0, 2)[0][0]
        y = _ops.unpack_bits.default(planes, flat.shape[1], [-1, 2], 0, per_row[2], 0, x.dtype)
        ctx.save_for_backward(planes if ctx.needs_input_grad[1] else None, outside, scale)
        ctx.layout, ctx.shape = layout, x.shape
        return y.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        planes, outside, scale = ctx.saved_tensors
        dx = dscale = None
        flat = rows_of(grad)
        if ctx.needs_input_grad[0]:
            dx = grad
            if outside is not None:
                again = torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(grad))
                run = reference_quant.binarize_backward if again else _ops.binarize_backward.default
                kind = (int(Surrogate.CLIP), 1.0, 0.0, int(Grad.X))
                dx = run(flat, None, None, ~outside, None, None, None, 1, 1, *kind)[0].reshape(ctx.shape)
        if planes is not None:
            t = _ops.unpack_bits.default(planes, flat.shape[1], [-1, 2], 0, None, 0, ops.wide(grad))
            dscale = of_parameter(reference_quant.group_sums(flat.to(t.dtype) * t, *ctx.layout), scale)
        return dx, dscale, None, None, None, None


def _composed(x: Tensor, scale: Tensor, center: Tensor | None, threshold: Tensor, layout: Layout, clip: bool) -> Tensor:
    """`_Ternarize` in PyTorch operations that torch.func takes."""
    wide = x.to(ops.wide(x))
    at, size = wide.detach(), torch.as_tensor(reference_quant.spread(scale, x, *layout, 1.0))
    d = at - reference_quant.spread(center, x, *layout, 0.0)
    t = (d > reference_quant.spread(threshold, x, *layout, 0.0)).to(at.dtype)
    t = t - (d < -reference_quant.spread(threshold, x, *layout, 0.0)).to(at.dtype)
    moved = (wide - at).nan_to_num(0.0)  # inf - inf
    return (t * size + (torch.where(d.abs() > size.detach(), 0.0, moved) if clip else moved)).to(x.dtype)


def _of_rows(p: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """A parameter as [R or 1, 1] of the flat rows of x."""
    if p.numel() == 1:
        return p.reshape(1, 1)
    inner = max(1, layout.inner // max(1, x.shape[-1]))
    return p[torch.arange(x.numel() // max(1, x.shape[-1]), device=x.device) // inner % layout.groups][:, None]


def ternarize(
    x: Tensor,
    method: str = "absmean",
    *,
    dim: int | None = 0,
    surrogate: str = "identity",
    center: bool = False,
    detach: bool = True,
    packed: bool = False,
) -> Tensor | BitTensor:
    """y = scale t, t in -1, 0, +1: nonzero where |x - center| > threshold.

    | method | scale | threshold | source |
    |---|---|---|---|
    | "twn" | mean of \\|x\\| over \\|x\\| > threshold | 0.7 mean \\|x\\| | "Ternary Weight Networks" |
    | "mean43" | 4/3 mean \\|x\\| | scale / 2 | "Binary and Ternary Natural Language Generation" |
    | "absmean" | mean \\|x\\|, at least 1e-5 | scale / 2 | BitNet b1.58 |

    Args:
        x: any shape; float32, float16, bfloat16 (float64 by PyTorch operations). NaN becomes 0, but makes its scale
            NaN.
        dim: one scale for each index of this dimension (0: of a weight [out, ...]), which must not be the last of
            several; None: one for all.
        surrogate: dx = grad ("identity"), or where |x - center| <= scale ("clip").
        center: less the mean of x over what shares a scale (a constant in the backward).
        detach: whether the scale is a constant in the backward.
        packed: t as a BitTensor of two planes with the scale, and no gradient.

    Raises ValueError and TypeError.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if surrogate not in ("identity", "clip"):
        raise ValueError(f'surrogate must be "identity" or "clip", got {surrogate!r}')
    if x.dim() < 2 or (dim is not None and dim % x.dim() == x.dim() - 1):
        raise ValueError(
            f"ternarize takes rows along the last dimension and dim before it, got {list(x.shape)} and dim {dim}"
        )
    middle = None
    if center:
        middle = along_rows(x.detach(), dim).mean(1)
    scale, threshold = ternary_scale(x.detach() if detach else x, method, dim, middle)
    layout = layout_of(x, dim)
    if packed:
        rows = [None if p is None else _of_rows(p.detach(), x, layout) for p in (threshold, middle, scale)]
        return pack_ternary(x, rows[0], center=rows[1], scale=rows[2])  # type: ignore[arg-type]
    run = _composed if functorch_active() or forward_mode_active() else _Ternarize.apply
    return run(x, scale, middle, threshold, layout, surrogate == "clip")
