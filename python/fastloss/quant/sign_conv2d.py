"""The convolution of signs with signs: a product of bits in the forward, the backward from two bits an operand's sign."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .contract import Activation
from .ops import wide
from .patches import Geometry, correction, pack_kernel, pack_pixels, patches, source, unpack_kernel, unpack_pixels

_ops = torch.ops.fastloss


def packed_conv2d(
    pixels: Tensor, kernel: Tensor, kernel_popcounts: Tensor, scale: Tensor | None, bias: Tensor | None,
    geometry: Geometry, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """scale_o (signs * signs) + bias_o, [N, O, H', W'] with channels last in memory, of what `pack_pixels` and
    `pack_kernel` make."""
    rows, popcounts = patches(pixels, geometry)
    lacking = correction(kernel, geometry)
    outputs = kernel.shape[1] // geometry.groups
    # A float32 sum is exact up to 2^24; its epilogue rounds to float32, after a sum that lacks nothing.
    exact = torch.float32 if dtype != torch.float64 and geometry.columns < 1 << 24 else torch.int32
    fused = lacking is None and exact == torch.float32
    found = []
    for group in range(geometry.groups):
        own = slice(group * outputs, (group + 1) * outputs)
        epilogue = [None if p is None or not fused else p[own].float().contiguous() for p in (scale, bias)]
        found.append(
            _ops.bgemm.default(
                rows[group, None], popcounts[group, None], kernel[:, own].contiguous(),
                kernel_popcounts[:, own].contiguous(), geometry.columns, [2], -1, [2], -1, None, *epilogue,
                int(Activation.NONE), dtype if fused else exact,
            )
        )  # fmt: skip
    y = found[0] if len(found) == 1 else torch.cat(found, 1)
    y = y.reshape(pixels.shape[1], geometry.output[0] * geometry.output[1], kernel.shape[1])
    if not fused:
        y = y.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for change, by in ((y.add_, lacking), (y.mul_, scale), (y.add_, bias)):
            if by is not None:
                change(by.to(y.dtype))
        y = y.to(dtype)
    return y.unflatten(1, geometry.output).permute(0, 3, 1, 2)


def padded(x: Tensor, geometry: Geometry) -> Tensor:
    """The dense signs [N, C, H, W] with their padding."""
    if geometry.mode in ("zeros", "ones"):
        return pad(x, geometry.padding, value=float(geometry.mode == "ones"))
    return pad(x, geometry.padding, mode=geometry.mode)


def _unpadded(dx: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of `padded`."""
    left, right, top, bottom = geometry.padding
    if geometry.mode in ("zeros", "ones"):
        return dx[:, :, top : top + geometry.height, left : left + geometry.width]
    for dim, size, before, after in ((2, geometry.height, top, bottom), (3, geometry.width, left, right)):
        index = source(size, before, after, geometry.mode, dx.device)
        shape = list(dx.shape)
        shape[dim] = size
        dx = dx.new_zeros(shape).index_add(dim, index, dx)
    return dx


class SignConv2d(torch.autograd.Function):
    """y = scale_o conv2d(x, w) + bias_o of signs x [N, H, W, C] and w [O, C / groups, kh, kw], whose gradients are those
    of this formula. Saves the bits of x and of w."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, geometry: Geometry,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        pixels, (kernel, popcounts) = pack_pixels(x, geometry), pack_kernel(weight)
        ctx.save_for_backward(pixels, kernel, scale)
        ctx.geometry, ctx.dtypes = geometry, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return packed_conv2d(pixels, kernel, popcounts, scale, bias, geometry, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("binary_conv2d keeps bits, which have no second derivative: create_graph must be False")
        pixels, kernel, scale = ctx.saved_tensors
        geometry, (x_dtype, weight_dtype, bias_dtype) = ctx.geometry, ctx.dtypes
        signs = unpack_kernel(kernel, geometry, grad.dtype)
        factor = None if scale is None else scale.to(grad.dtype)[:, None, None, None]
        x = padded(unpack_pixels(pixels, geometry, grad.dtype), geometry)
        to_x, to_weight, to_scale, to_bias = ctx.needs_input_grad[:4]
        dx, dweight, dbias = torch.ops.aten.convolution_backward.default(
            grad, x, signs if factor is None else factor * signs, [signs.shape[0]], geometry.stride, [0, 0],
            geometry.dilation, False, [0, 0], geometry.groups, [to_x, to_weight or to_scale, to_bias],
        )  # fmt: skip
        dscale = (dweight * signs).sum((1, 2, 3), dtype=wide(grad)).to(scale.dtype) if to_scale else None
        if to_weight and factor is not None:
            dweight = dweight * factor
        return (
            _unpadded(dx, geometry).permute(0, 2, 3, 1).to(x_dtype) if to_x else None,
            dweight.to(weight_dtype) if to_weight else None,
            dscale,
            dbias.to(bias_dtype) if to_bias else None,
            None, None,
        )  # fmt: skip
