"""A linear layer of ternary weights for training: BitNet b1.58, ternary weight networks, TBT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import forward_mode_active, functorch_active
from ..pairs.arguments import autocast_dtype
from .binarize import of_parameter
from .binary_linear import check_weight
from .contract import Pack
from .lowbit_linear import check_act_quant, check_linear
from .lowbit_matmul import Coding, dequantized, integers, matmul, quantize_rows, ternary, transposed_matmul
from .ops import wide
from .reference_bits import unpack
from .ternarize import ternarize, ternary_scale

_ops = torch.ops.fastloss


def _column(p: Tensor | None) -> Tensor | None:
    """As [R or 1, 1]."""
    return None if p is None else p.reshape(-1, 1)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, center: Tensor | None, threshold: Tensor,
    clip: bool, quantize: bool, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    def pack(limit: Tensor) -> Tensor:
        return _ops.pack_bits.default(weight, int(Pack.TERNARY), _column(center), _column(limit), 0, 0, 2)[0]

    planes, coding = pack(threshold), ternary(x.shape[1])
    none = x.new_empty(0)
    outside = pack(scale)[0] if clip else none.byte()
    codes, x_scale = quantize_rows(x) if quantize else (none.char(), none)
    operand = codes if quantize else x
    y = matmul(operand, planes, coding, _column(scale), x_scale=x_scale if quantize else None, bias=bias, dtype=dtype)
    return y, planes, outside, codes, x_scale


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, scale, _, _, ctx.clip, ctx.quantize, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
    ctx.coding = ternary(x.shape[1])
    trained = weight.requires_grad or scale.requires_grad
    ctx.save_for_backward(x if trained and not ctx.quantize else None, bias, scale, *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, bias, scale, planes, outside, codes, x_scale = ctx.saved_tensors
    coding: Coding = ctx.coding
    needs, dtype = ctx.needs_input_grad, wide(grad)
    dx = dweight = dbias = dscale = None
    if needs[0]:
        dx = transposed_matmul(grad, planes, coding, _column(scale), ctx.x_dtype)
    if needs[1] or needs[3]:
        if ctx.quantize:
            x = codes.to(dtype) * x_scale[:, None]
        product = grad.T @ x.to(grad.dtype)
        if needs[3]:
            terms = product * integers(planes, coding, product.dtype)
            dscale = of_parameter(terms.sum(1, dtype=dtype), scale)
        dweight = product if not ctx.clip else torch.where(unpack(outside, coding.columns).bool(), 0.0, product)
        dweight = dweight.to(ctx.weight_dtype)
    if needs[2]:
        dbias = grad.sum(0, dtype=dtype).to(bias.dtype)
    return dx, dweight if needs[1] else None, dbias, dscale, None, None, None, None, None


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


class _TernaryLinearFunctorch(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def ternary_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, method: str = "absmean", dim: int | None = None,
    surrogate: str = "identity", center: bool = False, act_quant: str | None = None, detach: bool = True,
) -> Tensor:  # fmt: skip
    """y = x (scale t)^T + bias, t in -1, 0, +1 the ternarised latent weight; the gradient of W is that of `ternarize`.

    Args:
        x: [..., K] float32, float16 or bfloat16 (float64 by PyTorch operations); the result has its dtype, autocast's where that
            is on.
        weight: latent weights [N, K]; bias: [N] or None.
        method: scale and threshold of W, see `ternarize`: "absmean" (BitNet b1.58), "twn", "mean43" (TBT).
        dim: None: one scale for all of W (BitNet); 0: one for each row (TWN, TBT).
        surrogate: dW = dY^T x ("identity"), or 0 where |W - c| > scale ("clip").
        center: c = the mean of W over what shares a scale (a constant in the backward); False: 0.
        act_quant: None, or "int8row": each row of x as int8 times absmax / 127 (BitNet), with the gradient of the identity.
        detach: whether the scale is a constant in the backward; else dscale = sum of dY^T x t goes on into W.

    Saved are 2 bits an element of W (3 with "clip") and x, or its int8 codes. Sources: `ternarize`; "The Era of 1-bit LLMs:
    All Large Language Models are in 1.58 Bits". Raises ValueError and TypeError.
    """
    check_weight(weight)
    check_linear(x, weight.shape[1], weight.shape[0], bias)
    quantize = check_act_quant(act_quant)
    if surrogate not in ("identity", "clip"):
        raise ValueError(f'surrogate must be "identity" or "clip", got {surrogate!r}')
    if dim not in (None, 0):
        raise ValueError(f"dim must be None (one scale) or 0 (one a row), got {dim!r}")
    middle = None
    if center:
        latent = weight.detach().to(wide(weight))
        middle = latent.mean().reshape(1) if dim is None else latent.mean(1)
    scale, threshold = ternary_scale(weight.detach() if detach else weight, method, dim, middle)
    x = x.to(autocast_dtype(x))
    if forward_mode_active():  # `ternarize` has a composition that it takes
        dense = ternarize(weight, method, dim=dim, surrogate=surrogate, center=center, detach=detach)
        assert isinstance(dense, Tensor)
        y = (dequantized(x.to(wide(x))) if quantize else x.to(wide(x))) @ dense.to(wide(x)).T
        return (y if bias is None else y + bias).to(x.dtype)
    apply = (_TernaryLinearFunctorch if functorch_active() else _TernaryLinear).apply
    args = (x.reshape(-1, x.shape[-1]), weight, bias, scale, middle, threshold, surrogate == "clip", quantize)
    return apply(*args, x.dtype)[0].reshape(*x.shape[:-1], weight.shape[0])
