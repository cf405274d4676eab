"""`compressed_linear`: a linear layer whose frozen weight stays compressed, differentiable in its input and bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import registry
from ..autograd import forward_mode_active, functorch_active
from ..ops import _library
from . import crossover
from .compressed_tensor import CompressedTensor
from .contract import check_plan

#: exact: decode, then torch's product. fused: `lossless_linear` where it has a kernel. auto: the faster of both.
MODES = ("exact", "auto", "fused")


def check_mode(mode: str) -> None:
    """Raise ValueError unless `mode` is one of MODES."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


def compressed_linear(x: Tensor, weight: CompressedTensor, bias: Tensor | None = None, mode: str = "exact") -> Tensor:
    """x Wᵀ + bias, of a compressed matrix W.

    Nothing dense is kept for the backward, which decodes W again: grad_x = grad W, bit for bit that of the dense layer in
    every mode. W is frozen: it gets no gradient.

    Args:
        x: [..., columns], of W's dtype (under autocast: what F.linear takes there).
        weight: W [rows, columns].
        bias: [rows] or None.
        mode: "exact" decodes W and lets torch multiply: outputs are those of F.linear with the dense weight, bit for bit.
            "fused" multiplies by the compressed numbers (fp32 accumulation; another order of summation) wherever a kernel
            takes the shape. "auto" takes of both the one that `fastloss.lossless.crossover` found faster for this shape.

    Raises TypeError and ValueError with what was got and what is accepted.
    """
    if not isinstance(weight, CompressedTensor):
        raise TypeError(f"weight must be a CompressedTensor, got {type(weight).__name__}")
    if len(weight.header.shape) != 2:
        raise ValueError(f"weight must be a matrix, got shape {list(weight.header.shape)}")
    return product(x, bias, weight.blob, weight.plan, weight.dtype, mode)


def product(
    x: Tensor, bias: Tensor | None, blob: Tensor, plan: Sequence[int], dtype: torch.dtype, mode: str = "exact"
) -> Tensor:
    """`compressed_linear` of the parts of a CompressedTensor, as the layers hold them."""
    check_mode(mode)
    x, bias = multiplied(x, dtype), None if bias is None else autocast(bias, dtype)
    if x.dim() < 1 or x.shape[-1] != plan[5]:
        raise ValueError(f"x must be [..., {plan[5]}], got {list(x.shape)}")
    if torch.is_grad_enabled() or functorch_active() or forward_mode_active():
        return _apply(_Product, x, bias, blob, plan, dtype, mode)
    return _product(x, bias, blob, plan, dtype, mode)


def multiplied(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as it is multiplied by a weight of `dtype`; TypeError where torch would not multiply them either."""
    cast = autocast(x, dtype)
    by_autocast = torch.is_autocast_enabled(x.device.type) and cast.dtype == torch.get_autocast_dtype(x.device.type)
    if cast.dtype != dtype and not by_autocast:
        raise TypeError(
            f"the input must be {dtype} like the compressed weight, got {x.dtype}: use autocast, or decompress, convert "
            "and compress the model again"
        )
    return cast


def autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the dtype in which autocast multiplies it by a weight of `dtype`."""
    wide = torch.float64 in (x.dtype, dtype)
    if wide or not x.is_floating_point() or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


# ---------------------------------------------------------------------------------------------- ops
# They are ops so that a compiled graph does not share one decoded weight between forward and backward and keep it: only
# inside them is W ever dense. They are no kernels: `lossless_decode` and `lossless_linear`, which they call, are. The former
# is called past the dispatcher, which is where such a call came from, and which costs more than to decode a small layer.


def decoded(blob: Tensor, plan: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """The dense matrix, in `like`'s dtype and on its device, to which the compressed bytes are copied first."""
    there = blob.to(like.device, non_blocking=True)
    check_plan(there, plan, dtype)
    weight: Tensor = registry.run("lossless_decode", there, plan, 0, plan[3], dtype)
    return weight.reshape(plan[4], plan[5]).to(like.dtype)


def _compressed_linear(
    x: Tensor, blob: Tensor, plan: Sequence[int], dtype: torch.dtype, bias: Tensor | None, mode: str
) -> Tensor:
    rows = x.reshape(-1, plan[5])
    if mode != "exact" and x.dtype == dtype:
        there = blob.to(x.device, non_blocking=True)
        choose = crossover.has_kernel if mode == "fused" else crossover.fused_wins
        if choose(rows, there, plan, bias):
            out = torch.ops.fastloss.lossless_linear(rows, there, plan, bias)
            return out.reshape(*x.shape[:-1], plan[4])
    return F.linear(x, decoded(blob, plan, dtype, x), bias)


def _compressed_linear_backward(grad: Tensor, blob: Tensor, plan: Sequence[int], dtype: torch.dtype) -> Tensor:
    rows = grad.reshape(-1, plan[4])
    return rows.mm(decoded(blob, plan, dtype, grad)).reshape(*grad.shape[:-1], plan[5])


def _define_product(schema: str, run: Any, columns: int) -> None:
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")

    def fake(x: Tensor, blob: Tensor, plan: Sequence[int], *_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], plan[columns]))

    torch.library.register_fake(f"fastloss::{name}", fake, lib=_library)


_define_product(
    "compressed_linear(Tensor x, Tensor blob, int[] plan, ScalarType dtype, Tensor? bias, str mode) -> Tensor",
    _compressed_linear, 4,
)  # fmt: skip
_define_product(
    "compressed_linear_backward(Tensor grad, Tensor blob, int[] plan, ScalarType dtype) -> Tensor",
    _compressed_linear_backward, 5,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- autograd


# Each Function has a twin for torch.func and forward mode: its `setup_context` form costs as much as the rest of a small
# layer's call, and torch.compile does not take its rules.


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, blob: Tensor, *rest: Any) -> Tensor:
        _keep(ctx, blob, *rest)
        return _product(x, bias, blob, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (blob,) = ctx.saved_tensors
        d_x = _apply(_Transposed, grad, blob, ctx.plan, ctx.dtype, ctx.mode) if ctx.needs_input_grad[0] else None
        d_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return d_x, d_bias, None, None, None, None


class _Transposed(torch.autograd.Function):
    """grad W: the gradient of the product, whose own gradient is the product again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, blob: Tensor, *rest: Any) -> Tensor:
        _keep(ctx, blob, *rest)
        return _transposed(grad, blob, *rest)

    @staticmethod
    def backward(ctx: Any, again: Tensor) -> tuple[Tensor | None, ...]:
        (blob,) = ctx.saved_tensors
        return _apply(_Product, again, None, blob, ctx.plan, ctx.dtype, ctx.mode), None, None, None, None


def _keep(ctx: Any, blob: Tensor, plan: Sequence[int], dtype: torch.dtype, mode: str) -> None:
    ctx.plan, ctx.dtype, ctx.mode = plan, dtype, mode
    ctx.save_for_backward(blob)


def _product(
    x: Tensor, bias: Tensor | None, blob: Tensor, plan: Sequence[int], dtype: torch.dtype, mode: str
) -> Tensor:
    return torch.ops.fastloss.compressed_linear(x, blob, plan, dtype, bias, mode)


def _transposed(grad: Tensor, blob: Tensor, plan: Sequence[int], dtype: torch.dtype, mode: str) -> Tensor:
    return torch.ops.fastloss.compressed_linear_backward(grad, blob, plan, dtype)


def _front(x: Tensor, dim: int | None) -> Tensor:
    """A batched operand with its batch first: leading dims are what the product has anyway."""
    return x if dim is None else x.movedim(dim, 0)


def _not_batched(blob_dim: int | None) -> None:
    if blob_dim is not None:
        raise ValueError("vmap over compressed weights is not possible: every blob has its own size")


class _ProductTransforms(_Product):
    forward = staticmethod(_product)  # type: ignore[assignment]  # which has no ctx

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs[2:])
        ctx.save_for_forward(inputs[2])
        ctx.shape = output.shape

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, *_: Any) -> Tensor | None:
        (blob,) = ctx.saved_tensors
        if x is None:
            return None if bias is None else bias.expand(ctx.shape)
        return _apply(_Product, x, bias, blob, ctx.plan, ctx.dtype, ctx.mode)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, bias: Tensor | None, blob: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        _not_batched(in_dims[2])
        x = _front(x, in_dims[0])
        if bias is None or in_dims[1] is None:
            return _apply(_Product, x, bias, blob, *rest), 0
        bias = _front(bias, in_dims[1])
        out = _apply(_Product, x, None, blob, *rest)
        if in_dims[0] is None:
            out = out.expand(info.batch_size, *out.shape)
        return out + bias.reshape(bias.shape[0], *([1] * (out.dim() - 2)), bias.shape[1]), 0


class _TransposedTransforms(_Transposed):
    forward = staticmethod(_transposed)  # type: ignore[assignment]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs[1:])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: Any) -> Tensor:
        (blob,) = ctx.saved_tensors
        return _apply(_Transposed, grad, blob, ctx.plan, ctx.dtype, ctx.mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], grad: Tensor, blob: Tensor, *rest: Any) -> tuple[Tensor, int]:
        _not_batched(in_dims[1])
        return _apply(_Transposed, _front(grad, in_dims[0]), blob, *rest), 0


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    if functorch_active() or forward_mode_active():
        function = _ProductTransforms if function is _Product else _TransposedTransforms
    return function.apply(*args)  # type: ignore[no-any-return]
