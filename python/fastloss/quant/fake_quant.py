"""Quantisation and back, with learned steps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import batched, forward_mode_active, functorch_active
from . import reference_quant
from .binarize import of_parameter
from .contract import Grad
from .layout import Layout, check_parameter, layout_of, rows_of

_ops = torch.ops.fastloss
#: SEQ clamps here, so that the outermost level is no wider than the others.
_SEQ_LIMIT = 0.99


class Levels(NamedTuple):
    """q = (round(clamp(v, low, high) steps - shift) + shift) / steps."""

    low: float
    high: float
    steps: float
    shift: float
    rounded: bool  # whether v is rounded before the range is tested

    @property
    def largest(self) -> float:
        """Qp of the gradient factor: the largest level, of SEQ in whole steps (ternary: 1)."""
        if self.steps == 1.0:
            return self.high
        return self.steps - 1 if self.shift else 1.0


def lsq_levels(bits: float, signed: bool = True) -> Levels:
    """-2^(bits-1) .. 2^(bits-1) - 1, or 0 .. 2^bits - 1; one signed bit has -1, 0 and 1."""
    if bits != int(bits) or not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")
    if not signed:
        return Levels(0.0, 2.0**bits - 1, 1.0, 0.0, False)
    low, high = (-1.0, 1.0) if bits == 1 else (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    return Levels(low, high, 1.0, 0.0, False)


def seq_levels(bits: float) -> Levels:
    """SEQ of ParetoQ, in units of the largest magnitude: bits 2 has +-1/4 and +-3/4; "1.58" (ternary) has 0 and
    +-2/3."""
    if bits in (1.58, 0):
        return Levels(-_SEQ_LIMIT, _SEQ_LIMIT, 1.5, 0.0, False)
    if bits != int(bits) or not 2 <= bits <= 8:
        raise ValueError(f"bits of SEQ must be 1.58 or 2 to 8, got {bits}")
    return Levels(-_SEQ_LIMIT, _SEQ_LIMIT, 2.0 ** (bits - 1), 0.5, False)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, offset, zero_point, layout, levels, factor = inputs
    ctx.save_for_backward(x, scale, offset, zero_point)
    ctx.layout, ctx.levels, ctx.factor = layout, levels, factor


def _forward(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    zero_point: Tensor | None,
    layout: Layout,
    levels: Levels,
    factor: float,
) -> Tensor:
    return _ops.fake_quant.default(rows_of(x), scale, offset, zero_point, *layout, *levels).reshape(x.shape)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, offset, zero_point = ctx.saved_tensors
    to_x, to_scale, to_offset, to_zero = ctx.needs_input_grad[:4]
    needs = Grad.X * to_x | Grad.SCALE * to_scale | Grad.SHIFT * (to_offset or to_zero)
    again = torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(grad))
    run = reference_quant.fake_quant_backward if again else _ops.fake_quant_backward.default
    dx, dscale, doffset = run(
        rows_of(grad), rows_of(x), scale, offset, zero_point, *ctx.layout, *ctx.levels, int(needs)
    )
    return (
        dx.reshape(x.shape) if to_x else None,
        of_parameter(dscale, scale) * ctx.factor if to_scale else None,
        of_parameter(doffset, offset) * ctx.factor if to_offset else None,
        of_parameter(-doffset * scale, zero_point) * ctx.factor if to_zero else None,
        None, None, None,
    )  # fmt: skip


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _setup(ctx, inputs, inputs[0])
        return _forward(*inputs)

    backward = staticmethod(_backward)


class _FakeQuantFunctorch(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _forward(*inputs)

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def _composed(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    zero_point: Tensor | None,
    layout: Layout,
    levels: Levels,
    factor: float,
) -> Tensor:
    """The same in PyTorch operations that forward-mode AD takes: the derivatives as constants, times what moves."""
    size, shift, zero = (None if p is None else p.detach() for p in (scale, offset, zero_point))
    assert size is not None
    low, high, steps, half, rounded = levels
    v, q, inside = reference_quant.quantiser_levels(
        x.detach(), size, shift, zero, *layout, low, high, steps, half, rounded
    )
    y = q * reference_quant.spread(size, x, *layout, 1.0) + reference_quant.spread(shift, x, *layout, 0.0)

    def moved(p: Tensor | None) -> Tensor | float:
        return reference_quant.spread(None if p is None else (p - p.detach()).nan_to_num(0.0), x, *layout, 0.0)

    outside = factor * torch.where(inside, 0.0, 1.0).to(y.dtype)
    y = y + torch.where(inside, (x - x.detach()).nan_to_num(0.0).to(y.dtype), 0.0)
    y = y + factor * torch.where(inside, q - v, q) * moved(scale)
    y = y + outside * (moved(offset) - reference_quant.spread(size, x, *layout, 1.0) * moved(zero_point))
    return y.to(x.dtype)


def quantised(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    zero_point: Tensor | None,
    layout: Layout,
    levels: Levels,
    factor: float,
) -> Tensor:
    """x on `levels`, each parameter flat, by whatever takes the transformation that is active."""
    if forward_mode_active():
        return _composed(x, scale, offset, zero_point, layout, levels, factor)
    if torch.compiler.is_compiling():  # with dynamic shapes the factor is a symbol, which a Function does not take
        scale = scale.detach() + (scale - scale.detach()) * factor
        offset, zero_point = (
            None if p is None else p.detach() + (p - p.detach()) * factor for p in (offset, zero_point)
        )
        factor = 1.0
    apply = (_FakeQuantFunctorch if functorch_active() else _FakeQuant).apply
    return apply(x, scale, offset, zero_point, layout, levels, factor)


def fake_quant(
    x: Tensor,
    scale: Tensor,
    *,
    bits: float = 8,
    signed: bool = True,
    mode: str = "lsq",
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
    dim: int | None = None,
    group: int = 0,
    grad_factor: str | float | None = "lsq",
) -> Tensor:
    """x rounded to the levels of a quantiser, with gradients in x, in the step `scale`, and in `offset` or
    `zero_point`.

    v = (x - offset) / scale;   q = round(clamp(v, Qn - zero_point, Qp - zero_point)), half to even;   y = q scale +
    offset.
    dx = g where v is in the range, else 0;  dscale = f sum g (q - v) in the range, f sum g q outside;  doffset = f
    sum of g outside;
    dzero_point = -scale doffset. f is the gradient factor.

    Args:
        x: any shape; float32, float16, bfloat16 (float64 by PyTorch operations).
        scale: > 0; 1 number; x.shape[dim]; or one for each `group` neighbours along the last dimension.
        bits: 1 to 16; with mode="seq" 1.58 or 2 to 8.
        signed: Qn, Qp = -2^(bits-1), 2^(bits-1) - 1; else 0, 2^bits - 1.
        mode: "lsq" ("Learned Step Size Quantization"); "affine": the same with a zero point, v rounded before the
            range is tested, and a zero point that is rounded and
            clamped to the range first, as
            torch's fake quantisation does; "seq" (ParetoQ): v clamped to +-0.99, levels at half steps, scale is the
            largest magnitude.
        zero_point, offset: as many numbers as `scale`, or 1. zero_point in steps (affine), offset in units of x
            (EQ-Net).
        dim, group: which numbers share a scale: all of x (None, 0); each index of `dim`; groups.
        grad_factor: "lsq": 1 / sqrt(numbers that share a scale * Qp); None: 1; or a number.

    The sums have a fixed order: bit-equal from run to run. Saves x. Raises ValueError and TypeError.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if mode not in ("lsq", "affine", "seq"):
        raise ValueError(f'mode must be "lsq", "affine" or "seq", got {mode!r}')
    if mode == "seq" and not signed:
        raise ValueError('mode="seq" has signed levels, got signed=False')
    if zero_point is not None and mode != "affine":
        raise ValueError(f'zero_point is of mode="affine", got mode={mode!r}: offset is the shift of the others')
    levels = seq_levels(bits) if mode == "seq" else lsq_levels(bits, signed)._replace(rounded=mode == "affine")
    layout = layout_of(x, dim, group)
    size, shift, zero = (
        check_parameter(n, p, layout, x) for n, p in (("scale", scale), ("offset", offset), ("zero_point", zero_point))
    )
    if size is None:
        raise TypeError("scale must be a tensor, got None")
    if zero is not None:  # rounded with a straight-through gradient, clamped with the clamp's own
        near = zero.clamp(levels.low, levels.high)
        zero = near + (near.round() - near).detach()
    factor = _factor(grad_factor, x.numel() // max(1, size.numel()), levels.largest)
    return quantised(x, size, shift, zero, layout, levels, factor)


def _factor(grad_factor: str | float | None, sharing: int, largest: float) -> float:
    if grad_factor is None:
        return 1.0
    if grad_factor == "lsq":
        return 1.0 / math.sqrt(max(1, sharing) * max(largest, 1e-6))
    if isinstance(grad_factor, str):
        raise ValueError(f'grad_factor must be "lsq", None or a number, got {grad_factor!r}')
    return float(grad_factor)
