"""Binarisation with a surrogate gradient."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..autograd import batched, forward_mode_active, functorch_active
from ..fused import direct
from . import ops, reference_quant
from .bit_tensor import BitTensor
from .bits import pack_bits
from .contract import Grad, Save, Surrogate
from .layout import Layout, check_parameter, layout_of, rows_of
from .surrogates import SurrogateFunction, surrogate_of

_ops = torch.ops.fastloss
SAVES = ("auto", "exact", "mask", "u8")
_BLOCK = 512  # numbers added in float32
# As plain integers: an enum's & and | take microseconds, as long as a small kernel.
_DENSE, _SIGNS, _MASK, _CODES = (int(save) for save in (Save.DENSE, Save.SIGNS, Save.MASK, Save.CODES))
_X, _SCALE, _SHIFT = (int(grad) for grad in (Grad.X, Grad.SCALE, Grad.SHIFT))


def _saved(save: str, surrogate: SurrogateFunction) -> int:
    """The flag of what the slopes are made of again in the backward; 0: x itself, or nothing for the identity."""
    if save not in SAVES:
        raise ValueError(f"save must be one of {', '.join(SAVES)}, got {save!r}")
    kind = surrogate.kind
    if save == "mask" and kind not in (Surrogate.CLIP, Surrogate.IDENTITY):
        raise ValueError(f"save='mask' holds a slope of 0 or 1 (clip, identity), got {kind.name.lower()}")
    if save == "u8" and kind == Surrogate.BIPER:
        raise ValueError("save='u8' needs a slope that is 0 beyond some |u|; biper's is not")
    if kind == Surrogate.IDENTITY or save == "exact":
        return 0
    if save == "u8":
        return _CODES
    return _MASK if save == "mask" or kind == Surrogate.CLIP else 0


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _kept(slopes: int, surrogate: SurrogateFunction, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> int:
    """`slopes`, and the signs where the scale's gradient wants them and x is not kept; nothing without a gradient."""
    if functorch_active():  # which does not say what requires a gradient
        learned = scale is not None
    elif not _differentiable(x, shift, scale):
        return 0
    else:
        learned = scale is not None and scale.requires_grad
    exact = not slopes and surrogate.kind != Surrogate.IDENTITY
    return slopes | _SIGNS if learned and not exact else slopes


def _composed(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, layout: Layout, surrogate: SurrogateFunction
) -> Tensor:
    """`binarize` in PyTorch operations that forward-mode AD takes."""
    u = x.to(ops.wide(x)) - reference_quant.spread(shift, x, *layout, 0.0)
    size = torch.as_tensor(reference_quant.spread(scale, x, *layout, 1.0)).to(u)
    kind, p0, p1 = surrogate
    at = u.detach()
    sign = torch.where((torch.sin(p0 * at) if kind == Surrogate.BIPER else at) >= 0, 1.0, -1.0).to(u.dtype)
    moved = (u - at).nan_to_num(0.0)  # inf - inf
    return (sign * size + size.detach() * reference_quant.slope(at, kind, p0, p1).nan_to_num(0.0) * moved).to(x.dtype)


def _given(t: Tensor) -> Tensor | None:
    """What was not asked for has one dimension; what was has two, perhaps without rows."""
    return t if t.dim() == 2 else None


def _keep(ctx: Any, inputs: tuple[Any, ...], saved: tuple[Tensor, ...]) -> None:
    x, shift, scale, layout, surrogate, kept = inputs
    exact = not kept & (_MASK | _CODES) and surrogate.kind != Surrogate.IDENTITY
    ctx.save_for_backward(x if exact else None, shift, scale, *(_given(t) for t in saved))
    ctx.layout, ctx.surrogate, ctx.shape = layout, surrogate, x.shape


def _forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, layout: Layout, surrogate: SurrogateFunction, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, signs, mask, codes)."""
    y, signs, _, mask, codes = _op("binarize", x, shift, scale)(
        rows_of(x), shift, scale, *layout, *_numbers(surrogate), _DENSE | kept
    )
    return y if y.shape == x.shape else y.reshape(x.shape), signs, mask, codes


def _op(name: str, *tensors: Tensor | None) -> Any:
    """The op; of plain tensors straight its kernel, since the dispatcher would cost more than a small one."""
    if direct(*tensors) and not functorch_active():
        return functools.partial(registry.run, name)
    return getattr(_ops, name).default


def _numbers(surrogate: SurrogateFunction) -> tuple[int, float, float]:
    return int(surrogate.kind), surrogate.p0, surrogate.p1


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, shift, scale, signs, mask, codes = ctx.saved_tensors
    needs = sum(flag for flag, needed in zip((_X, _SHIFT, _SCALE), ctx.needs_input_grad, strict=False) if needed)
    if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(grad)):
        run = reference_quant.binarize_backward
    else:
        run = _op("binarize_backward", grad, shift, scale)
    dx, dscale, dshift = run(
        rows_of(grad), None if x is None else rows_of(x), signs, mask, codes, shift, scale,
        *ctx.layout, *_numbers(ctx.surrogate), needs,
    )  # fmt: skip
    return (
        (dx if dx.shape == ctx.shape else dx.reshape(ctx.shape)) if needs & _X else None,
        of_parameter(dshift, shift) if needs & _SHIFT else None,
        of_parameter(dscale, scale) if needs & _SCALE else None,
        None, None, None,
    )  # fmt: skip


def of_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a parameter of groups, or of one number that all groups share."""
    return (gradient.sum().reshape(1) if parameter.numel() == 1 else gradient).to(parameter.dtype)


class _Binarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, *saved = _forward(*inputs)
        _keep(ctx, inputs, tuple(saved))
        return y

    backward = staticmethod(_backward)


class _BinarizeFunctorch(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _keep(ctx, inputs, output[1:])

    backward = staticmethod(_backward)


def along_rows(x: Tensor, dim: int | None) -> Tensor:
    """x with a row for each index of `dim`, or one row; float32, float64 for float64."""
    wide = x.to(ops.wide(x))
    if dim is None:
        return wide.reshape(1, -1)
    return wide.movedim(dim, 0).flatten(1) if x.dim() > 1 else wide.reshape(-1, 1)


def mean_magnitude(x: Tensor, dim: int | None, center: Tensor | None = None) -> Tensor:
    """mean |x - center| of each index of `dim` [groups], or of all of x [1]; float32, float64 for float64."""
    flat = along_rows(x, dim)
    if center is not None:
        flat = flat - center[:, None]
    # torch's norm adds one number after the other, 2 % off at 2^24 of them: short ones of float32, their sum in float64.
    whole = flat.shape[1] // _BLOCK * _BLOCK
    norms = torch.linalg.vector_norm(flat[:, :whole].reshape(flat.shape[0], whole // _BLOCK, _BLOCK), 1, 2)
    sums = norms.sum(1, dtype=torch.float64) + torch.linalg.vector_norm(flat[:, whole:], 1, 1)
    return (sums / max(1, flat.shape[1])).to(flat.dtype)


def _statistics(
    x: Tensor, scale: str | Tensor | None, center: bool, shift: Tensor | None, dim: int, detach: bool
) -> tuple[Tensor | None, Tensor | None, int | None]:
    """(scale, shift, dim of both)."""
    if isinstance(scale, str) and scale not in ("mean", "row"):
        raise ValueError(f'scale must be None, "mean", "row" or a tensor, got {scale!r}')
    for name, p in (("scale", scale), ("shift", shift)):
        if p is not None and not isinstance(p, (str, Tensor)):
            raise TypeError(f"{name} must be a tensor, got {type(p).__name__}")
    if center and shift is not None:
        raise ValueError("center makes its own shift: give one of them")
    along = None if isinstance(scale, str) and scale == "mean" else dim
    if x.dim() and (center or isinstance(scale, str)):
        layout_of(x, along)  # raises for a dim that x does not have
    if center:
        shift = along_rows(x, along).mean(1)
        shift = shift.detach() if detach else shift
    if isinstance(scale, str):
        scale = mean_magnitude(x, along, shift if center else None)
        scale = scale.detach() if detach else scale
    return scale, shift, dim


def binarize(
    x: Tensor,
    surrogate: str | SurrogateFunction = "clip",
    *,
    scale: str | Tensor | None = None,
    center: bool = False,
    shift: Tensor | None = None,
    dim: int = 0,
    detach: bool = True,
    save: str = "auto",
    packed: bool = False,
) -> Tensor | BitTensor:
    """y = scale sign(u), u = x - shift, with the gradient of scale F(u), F the surrogate's function
    (`fastloss.quant.surrogates`).

    Args:
        x: any shape; float32, float16, bfloat16 (float64 by PyTorch operations). sign(0) = sign(-0.0) = +1, sign(NaN)
            = -1.
        surrogate: "clip", "identity", "approx" ("bireal", "react"), "reste", "biper", "swish", "fda", or one with its
            own numbers.
        scale: None (1); "mean": mean |x| of all of x; "row": of each index of `dim`; or a tensor of 1 or x.shape[dim]
            numbers (learned).
        center: shift = the mean of all of x (scale="mean") or of each index of `dim`; the scale is then mean |x -
            shift|.
        shift: a tensor of 1 or x.shape[dim] numbers (ReActNet's learned shift), or None.
        dim: the dimension along which scale and shift differ: 0 for weights [out, ...], 1 for NCHW, -1 for features.
        detach: whether the statistics that "mean", "row" and `center` make are constants in the backward (XNOR-Net,
            BiViT) or not (ReSTE).
        save: what the backward reads: "exact" x; "mask" one bit an element (clip, identity); "u8" |u| in 255 levels,
            whose slope is that of the nearest level; "auto": mask where it is exact (clip), nothing for identity, else x.
        packed: the signs as a BitTensor of rows of the last dimension, with the scale, and no gradient.

    Raises ValueError and TypeError. Sources of the surrogates: `fastloss.quant.surrogates`; scales and centring:
    "BiBench: Benchmarking and
    Analyzing Network Binarization".
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    function = surrogate_of(surrogate)
    slopes = _saved(save, function)
    scale, shift, along = _statistics(x, scale, center, shift, dim, detach)
    many = any(p is not None and p.numel() != 1 for p in (scale, shift))
    layout = layout_of(x, along if many else None)
    scale, shift = check_parameter("scale", scale, layout, x), check_parameter("shift", shift, layout, x)
    if packed:
        return _packed(x, function, scale, shift, layout)
    if forward_mode_active():
        return _composed(x, shift, scale, layout, function)
    inputs = (x, shift, scale, layout, function, _kept(slopes, function, x, shift, scale))
    if functorch_active():
        return _BinarizeFunctorch.apply(*inputs)[0]
    return _Binarize.apply(*inputs) if _differentiable(x, shift, scale) else _forward(*inputs)[0]


def _packed(
    x: Tensor, function: SurrogateFunction, scale: Tensor | None, shift: Tensor | None, layout: Layout
) -> BitTensor:
    for name, parameter in (("scale", scale), ("shift", shift)):
        if parameter is not None and parameter.numel() != 1 and layout.inner % max(1, x.shape[-1]):
            raise ValueError(f"packed=True takes a {name} of rows of the last dimension, not of its columns")

    def of_rows(parameter: Tensor | None) -> Tensor | None:
        if parameter is None or parameter.numel() == 1:
            return parameter
        return reference_quant.spread(parameter, x[..., :1], layout.groups, max(1, layout.inner // x.shape[-1]), 0.0)  # type: ignore[return-value]

    if function.kind == Surrogate.BIPER:
        u = x.to(ops.wide(x)) - reference_quant.spread(shift, x, *layout, 0.0)
        x, shift = torch.sin(function.p0 * u), None
    return pack_bits(x, center=of_rows(shift), scale=of_rows(scale))
