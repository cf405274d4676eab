"""A linear layer on packed weights of 1 to 4 bits: forward and dX read the bits, nothing of the size of a dense weight exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import forward_mode_active, functorch_active
from ..pairs.arguments import autocast_dtype
from .bit_tensor import BitTensor, check_bits
from .lowbit_matmul import (
    Coding,
    again,
    coding_of,
    dense,
    dequantized,
    integers,
    matmul,
    quantize_rows,
    transposed_matmul,
)  # fmt: skip
from .ops import wide

ACT_QUANT = (None, "int8row")


def _compose(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, planes: Tensor, coding: Coding, quantize: bool
) -> Tensor:
    """The same in operations that PyTorch differentiates in any way."""
    dtype = wide(x)
    y = (dequantized(x.to(dtype)) if quantize else x.to(dtype)) @ dense(planes, coding, scale, dtype).T
    return (y if bias is None else y + bias).to(x.dtype)


def forward_matmul(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, planes: Tensor, coding: Coding, quantize: bool
) -> Tensor:
    """x (value scale)^T + bias, x as it is or as int8 rows."""
    if not quantize:
        return matmul(x, planes, coding, scale, bias=bias)
    codes, x_scale = quantize_rows(x)
    return matmul(codes, planes, coding, scale, x_scale=x_scale, bias=bias, dtype=x.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, bias, planes, ctx.coding, ctx.quantize = inputs
    ctx.x_dtype = x.dtype
    # A frozen scale is the rule, and then the backward does not look at x.
    trained = scale is not None and scale.requires_grad
    ctx.save_for_backward(x if trained else None, scale, bias, planes)


def sum_by_scale(terms: Tensor, scale: Tensor, coding: Coding) -> Tensor:
    """[R, K] -> the sums over the numbers that share a scale, in its shape and dtype."""
    if coding.group:
        terms = torch.nn.functional.pad(terms, (0, scale.shape[1] * coding.group - coding.columns))
        found = terms.unflatten(1, (scale.shape[1], coding.group)).sum(2)
    else:
        found = terms.sum(1, keepdim=True)
    return (found if scale.shape[0] == found.shape[0] else found.sum(0, keepdim=True)).to(scale.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, bias, planes = ctx.saved_tensors
    coding: Coding = ctx.coding
    dx = dscale = dbias = None
    dtype = wide(grad)
    if ctx.needs_input_grad[0]:
        dx = transposed_matmul(grad, planes, coding, scale, ctx.x_dtype)
    if ctx.needs_input_grad[1]:
        x = dequantized(x.to(dtype)) if ctx.quantize else x.to(dtype)
        if coding.group or again(grad):
            dscale = sum_by_scale((grad.to(dtype).T @ x) * integers(planes, coding, dtype), scale, coding)
        else:
            products = grad.to(dtype) * matmul(x, planes, coding)
            dscale = sum_by_scale(products.sum(0)[:, None], scale, coding)
    if ctx.needs_input_grad[2]:
        dbias = grad.sum(0, dtype=dtype).to(bias.dtype)
    return dx, dscale, dbias, None, None, None


class _LowbitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _setup(ctx, inputs, inputs[0])
        return forward_matmul(*inputs)

    backward = staticmethod(_backward)


class _LowbitLinearFunctorch(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(forward_matmul)
    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def check_linear(x: Tensor, columns: int, rows: int, bias: Tensor | None) -> None:
    """Raise TypeError or ValueError unless x [..., columns] and bias [rows] are what a layer of this size takes."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.dim() < 1 or x.shape[-1] != columns:
        raise ValueError(f"x must be [..., {columns}] for a weight of {columns} columns, got {list(x.shape)}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias must be [{rows}], got {list(bias.shape)}")


def check_act_quant(act_quant: str | None) -> bool:
    """Whether rows of x become int8 codes; ValueError for an unknown name."""
    if act_quant not in ACT_QUANT:
        raise ValueError(f"act_quant must be one of {ACT_QUANT}, got {act_quant!r}")
    return act_quant == "int8row"


def lowbit_linear(x: Tensor, weight: BitTensor, bias: Tensor | None = None, *, act_quant: str | None = None) -> Tensor:
    """y = x W^T + bias, W the numbers of a BitTensor times their scales; differentiable in x, bias and `weight.scale`.

    Args:
        x: [..., K] float32, float16 or bfloat16 (float64: plain PyTorch); the result has its dtype, autocast's where that is on.
        weight: [R, K], of any kind: binary, ternary, codes or levels of up to 4 bits, one scale for all, a row or a group.
        bias: [R] or None.
        act_quant: None, or "int8row": each row of x is rounded to absmax / 127 times an int8 (half to even), the products are
            integers, and the gradient passes the rounding as it is (as in BitNet b1.58, "The Era of 1-bit LLMs").

    Products are exact and sums float32 (int32 with "int8row"). dX = dY (scale value) reads the same bits; nothing of x is saved
    unless `weight.scale` is trained: ds_rg = sum over m of dy_mr (x_g value_g^T)_mr. Raises TypeError and ValueError.
    """
    check_bits("weight", weight)
    if weight.planes.dim() != 3:
        raise ValueError(f"weight must be [R, K], got {list(weight.shape)}")
    check_linear(x, weight.columns, weight.rows, bias)
    quantize = check_act_quant(act_quant)
    x = x.to(autocast_dtype(x))
    planes, _ = weight.flat()
    args = (x.reshape(-1, weight.columns), weight.scale, bias, planes, coding_of(weight), quantize)
    if forward_mode_active():
        y = _compose(*args)
    else:
        y = (_LowbitLinearFunctorch if functorch_active() else _LowbitLinear).apply(*args)
    return y.reshape(*x.shape[:-1], weight.rows)
