"""GELU, SiLU, softmax and LayerNorm that save codes of 8 or 4 bits instead of tensors ("Mesa: A Memory-saving Training
Framework for Transformers"). Forwards are exact; gradients are those at the decoded numbers.

Backwards decode a piece, use it while it is in the cache, and go on: the decoded tensor never exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kept_memory, registry
from ..autograd import batched, forward_mode_active, functorch_active
from .saved_activation import ActivationCodec, EncodedActivation

_aten = torch.ops.aten
#: Numbers decoded at a time on a CPU: few enough to stay in its cache, beside the gradients.
_PIECE = 1 << 20


def _save(ctx: Any, encoded: EncodedActivation, *more: Tensor | None) -> None:
    ctx.save_for_backward(*encoded[:3], *more)
    ctx.described = tuple(encoded[3:])


def _saved(ctx: Any) -> tuple[EncodedActivation, tuple[Tensor | None, ...]]:
    codes, low, step, *more = ctx.saved_tensors
    return EncodedActivation(codes, low, step, *ctx.described), tuple(more)


def _by_pieces(grad: Tensor, group: int, columns: int, make: Callable[[int, int], Tensor]) -> Tensor:
    """make(begin, end) of the flat numbers, joined in grad's shape and dtype. Pieces are whole groups and whole rows;
    there is one where more would gain nothing."""
    n = grad.numel()
    if grad.device.type != "cpu" or torch.compiler.is_compiling() or batched(grad):
        return make(0, n).to(grad.dtype).reshape(grad.shape)
    unit = math.lcm(group, columns)
    piece = max(1, _PIECE // unit) * unit
    if n <= piece:
        return make(0, n).to(grad.dtype).reshape(grad.shape)
    made = kept_memory.empty_beside(grad, (n,), grad.dtype)
    for begin in range(0, n, piece):
        end = min(n, begin + piece)
        made[begin:end] = make(begin, end)
    return made.reshape(grad.shape)


def _fused(grad: Tensor, encoded: EncodedActivation, function: str) -> Tensor | None:
    """The gradient by a kernel that decodes as it goes; None where there is none for it."""
    if torch.compiler.is_compiling() or not grad.numel() or batched(grad):
        return None
    args = (grad, *encoded[:3], encoded.group, encoded.bits, function, encoded.shape[-1] if encoded.shape else 1)
    return registry.run("saved_gradient", *args) if registry.able("saved_gradient", *args) else None


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, codec: ActivationCodec) -> Tensor:
        _save(ctx, codec.encode(x))
        ctx.kind = kind
        return F.silu(x) if kind == "silu" else F.gelu(x, approximate=kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        encoded, _ = _saved(ctx)
        if (made := _fused(grad, encoded, ctx.kind)) is not None:
            return made, None, None
        flat = grad.reshape(-1)

        def make(begin: int, end: int) -> Tensor:
            g, x = flat[begin:end], encoded.part(begin, end)
            return _aten.silu_backward(g, x) if ctx.kind == "silu" else _aten.gelu_backward(g, x, approximate=ctx.kind)

        return _by_pieces(grad, encoded.group, 1, make), None, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codec: ActivationCodec) -> Tensor:
        y = torch.softmax(x, -1)
        _save(ctx, codec.encode(y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        encoded, _ = _saved(ctx)
        columns = encoded.shape[-1]
        if (made := _fused(grad, encoded, "softmax")) is not None:
            return made, None
        flat = grad.reshape(-1)

        def make(begin: int, end: int) -> Tensor:
            g, y = (t.reshape(-1, columns) for t in (flat[begin:end], encoded.part(begin, end)))
            return _aten._softmax_backward_data(g, y, -1, encoded.dtype).reshape(-1)

        return _by_pieces(grad, encoded.group, columns, make), None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, codec: ActivationCodec
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        unit, _, rstd = torch.native_layer_norm(wide, wide.shape[-1:], None, None, eps)
        _save(ctx, codec.encode(unit), rstd, weight)
        ctx.of_bias = None if bias is None else bias.dtype
        if weight is not None:
            unit = unit.mul_(weight)
        return (unit if bias is None else unit.add_(bias)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dx = rstd (a - mean a - u mean(a u)), a = g weight and u = (x - mean) rstd; dweight = sum g u, dbias = sum g."""
        encoded, (rstd, weight) = _saved(ctx)
        assert rstd is not None
        size = encoded.shape[-1]
        flat, of_rows = grad.reshape(-1), rstd.reshape(-1, 1)
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        zeros = rstd.new_zeros(size)
        dweight, dbias = torch.zeros_like(zeros), torch.zeros_like(zeros)
        wide = torch.ones_like(zeros) if weight is None else weight.to(zeros.dtype)

        def make(begin: int, end: int) -> Tensor:
            g, u = flat[begin:end].to(rstd.dtype).reshape(-1, size), encoded.part(begin, end).reshape(-1, size)
            rows = of_rows[begin // size : end // size]
            mean, one = torch.zeros_like(rows), torch.ones_like(rows)  # u has mean 0 and deviation 1 already
            dx, *sums = _aten.native_layer_norm_backward(
                g, u, [size], mean, one, wide, zeros, [to_x, to_weight, to_bias]
            )
            for total, part, needed in zip((dweight, dbias), sums, (to_weight, to_bias), strict=True):
                if needed:
                    total.add_(part)
            return dx.mul_(rows).reshape(-1) if to_x else flat[begin:end]

        dx = _by_pieces(grad, encoded.group, size, make)
        return (
            dx if to_x else None,
            dweight.to(weight.dtype) if to_weight and weight is not None else None,
            dbias.to(ctx.of_bias) if to_bias else None,
            None, None,
        )  # fmt: skip


def _check(x: Tensor, codec: ActivationCodec | None) -> ActivationCodec:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if codec is not None and not isinstance(codec, ActivationCodec):
        raise TypeError(f"codec must be an ActivationCodec, got {type(codec).__name__}")
    return ActivationCodec() if codec is None else codec


def _exact(*tensors: Tensor | None) -> bool:
    """Whether nothing will be read backwards, or torch.func asks, which torch's own functions serve."""
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return not needed or functorch_active() or forward_mode_active()


def gelu(x: Tensor, approximate: str = "none", codec: ActivationCodec | None = None) -> Tensor:
    """torch.nn.functional.gelu, which saves codes of x: dx = g gelu'(x').

    x: any shape, floating. codec: 8 bits in groups of 256 if None; without a gradient, and within torch.func, nothing is
    encoded (the running ranges of a codec stay as they are). First derivatives only. Raises ValueError and TypeError.
    """
    codec = _check(x, codec)
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate must be "none" or "tanh", got {approximate!r}')
    return F.gelu(x, approximate=approximate) if _exact(x) else _Pointwise.apply(x, approximate, codec)


def silu(x: Tensor, codec: ActivationCodec | None = None) -> Tensor:
    """torch.nn.functional.silu, which saves codes of x: dx = g silu'(x'). Arguments and errors of `gelu`."""
    codec = _check(x, codec)
    return F.silu(x) if _exact(x) else _Pointwise.apply(x, "silu", codec)


def softmax(x: Tensor, dim: int = -1, codec: ActivationCodec | None = None) -> Tensor:
    """torch.softmax, which saves codes of its result y, and nothing of x: dx = y' (g - sum g y').

    x: any shape of at least one dimension. The rest of `gelu`.
    """
    codec = _check(x, codec)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be in [{-x.dim()}, {x.dim()}), got {dim}")
    if _exact(x) or not x.numel():
        return torch.softmax(x, dim)
    return _Softmax.apply(x.movedim(dim, -1), codec).movedim(-1, dim)


def layer_norm(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, codec: ActivationCodec | None = None,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.layer_norm, which saves codes of u = (x - mean) / deviation, and the inverse deviations.

    x: [..., *normalized_shape]; weight, bias: normalized_shape, or None. The result and the gradient of x are in x's
    dtype. The rest of `gelu`.
    """
    codec = _check(x, codec)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"normalized_shape must be the last dimensions of x, {list(x.shape)}, got {list(shape)}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and tuple(p.shape) != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, got {list(p.shape)}")
    if _exact(x, weight, bias) or not x.numel():
        if all(p is None or p.dtype == x.dtype for p in (weight, bias)):
            return F.layer_norm(x, shape, weight, bias, eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
        return F.layer_norm(x.to(wide), shape, weight, bias, eps).to(x.dtype)
    rows = x.reshape(*x.shape[: -len(shape)], -1)
    flat = [None if p is None else p.reshape(-1) for p in (weight, bias)]
    return _LayerNorm.apply(rows, *flat, eps, codec).reshape(x.shape)
