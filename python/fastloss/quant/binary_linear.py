"""A linear layer of one-bit weights and one-bit inputs for training: saved are bits, never the input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import forward_mode_active, functorch_active
from ..pairs.arguments import autocast_dtype
from . import reference_quant
from .binarize import _given, _numbers, _statistics, binarize, of_parameter
from .contract import Activation, Grad, Save, Surrogate
from .layout import Layout, check_parameter, layout_of, rows_of
from .lowbit_linear import check_linear
from .lowbit_matmul import again, signs, transposed_matmul
from .ops import wide
from .surrogates import SurrogateFunction, surrogate_of

_ops = torch.ops.fastloss
SAVES = ("auto", "exact")


class Side(NamedTuple):
    """How one operand becomes bits: its surrogate, the layout of its shift and scale, and what the backward reads."""

    surrogate: SurrogateFunction
    layout: Layout
    kept: int  # of Save: MASK, CODES, or NOTHING: the operand itself, or nothing for the identity

    @property
    def exact(self) -> bool:
        """Whether the slope is made of the operand itself."""
        return not self.kept and self.surrogate.kind != Surrogate.IDENTITY

    def bits(self, x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(signs, popcounts, mask, codes)."""
        save = int(Save.SIGNS | self.kept)
        return _ops.binarize.default(x, shift, None, *self.layout, *_numbers(self.surrogate), save)[1:]

    def gradients(
        self, grad: Tensor, x: Tensor | None, found: tuple[Tensor, Tensor, Tensor], shift: Tensor | None,
        scale: Tensor | None, needs: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(dx, dscale, dshift) of scale sign(x - shift), from the gradient of that."""
        run = reference_quant.binarize_backward if again(grad) else _ops.binarize_backward.default
        bits, mask, codes = (_given(t) for t in found)
        return run(grad, x, bits, mask, codes, shift, scale, *self.layout, *_numbers(self.surrogate), needs)


def _side(surrogate: str | SurrogateFunction, layout: Layout, coded: bool) -> Side:
    function = surrogate_of(surrogate)
    kept = Save.MASK if function.kind == Surrogate.CLIP else Save.NOTHING
    if coded and function.kind not in (Surrogate.CLIP, Surrogate.IDENTITY, Surrogate.BIPER):
        kept = Save.CODES
    return Side(function, layout, int(kept))


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    input_shift: Tensor | None, input_side: Side, weight_side: Side, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    x_signs, x_popcounts, x_mask, x_codes = input_side.bits(x, input_shift)
    w_signs, w_popcounts, w_mask, w_codes = weight_side.bits(weight, shift)
    y = _ops.bgemm.default(
        x_signs[None], x_popcounts[None], w_signs[None], w_popcounts[None], x.shape[1], [2], -1, [2], -1, None,
        None if scale is None else scale.expand(len(weight)).contiguous(), None if bias is None else bias.to(wide(x)),
        int(Activation.NONE), dtype,
    )  # fmt: skip
    return y, x_signs, x_mask, x_codes, w_signs, w_mask, w_codes


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, scale, shift, input_shift, ctx.input_side, ctx.weight_side, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.shape, ctx.x_dtype, ctx.weight_dtype = (*x.shape, weight.shape[0]), x.dtype, weight.dtype
    # The latent weight is alive anyway; the input is kept only where its surrogate cannot do without.
    operands = x if ctx.input_side.exact else None, weight if ctx.weight_side.exact else None
    ctx.save_for_backward(*operands, bias, scale, shift, input_shift, *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, shift, input_shift, *found = ctx.saved_tensors
    x_found, w_found = tuple(found[:3]), tuple(found[3:])
    needs, columns = ctx.needs_input_grad, ctx.shape[1]
    dx = dweight = dbias = None
    dscale = dshift = dinput_shift = grad.new_empty(0)
    if needs[0] or needs[5]:
        across = None if scale is None else scale.reshape(-1, 1)
        dsigns = transposed_matmul(grad, w_found[0][None], signs(columns), across, ctx.x_dtype)
        dx, _, dinput_shift = ctx.input_side.gradients(
            dsigns, x, x_found, input_shift, None, int(Grad.X | (Grad.SHIFT if needs[5] else 0))
        )
    if needs[1] or needs[3] or needs[4]:
        dsigns = transposed_matmul(grad.T, x_found[0][None], signs(columns), None, wide(grad))
        wanted = Grad.X | (Grad.SCALE if needs[3] else 0) | (Grad.SHIFT if needs[4] else 0)
        dweight, dscale, dshift = ctx.weight_side.gradients(dsigns, weight, w_found, shift, scale, int(wanted))
        dweight = dweight.to(ctx.weight_dtype)
    if needs[2]:
        dbias = grad.sum(0, dtype=wide(grad)).to(bias.dtype)
    return (
        dx if needs[0] else None, dweight if needs[1] else None, dbias,
        of_parameter(dscale, scale) if needs[3] else None, of_parameter(dshift, shift) if needs[4] else None,
        of_parameter(dinput_shift, input_shift) if needs[5] else None, None, None, None,
    )  # fmt: skip


class _BinaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


class _BinaryLinearFunctorch(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def check_weight(weight: Tensor) -> None:
    """Raise TypeError or ValueError unless weight is [N, K] of floating numbers."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating tensor, got {given}")
    if weight.dim() != 2 or not weight.shape[1]:
        raise ValueError(f"weight must be [N, K] with at least one column, got {list(weight.shape)}")


def binary_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, input_surrogate: str | SurrogateFunction = "clip",
    weight_surrogate: str | SurrogateFunction = "clip", scale: str | Tensor | None = "row", center: bool = False,
    input_shift: Tensor | None = None, detach: bool = True, save: str = "auto",
) -> Tensor:  # fmt: skip
    """y = (sign(x - input_shift) sign(W - c)^T) scale + bias by packed bits, trained through surrogates of both signs.

    Args:
        x: [..., K] float32, float16 or bfloat16 (float64 by PyTorch operations). The result has its dtype, autocast's where
            that is on; the signs are those of x as given. sign(0) = +1, sign(NaN) = -1.
        weight: latent weights [N, K]; bias: [N] or None.
        input_surrogate, weight_surrogate: as in `binarize`: a name or one of `fastloss.quant.surrogates`.
        scale: "row" (mean |W - c| of each row), "mean" (of all of W), None (1), or a tensor of 1 or N numbers (learned).
        center: c = the mean of each row of W (of all of W with scale="mean"); False: 0.
        input_shift: 1 or K learned numbers (ReActNet's RSign), or None.
        detach: whether the statistics of W are constants in the backward (XNOR-Net, BiViT) or not (ReSTE).
        save: what the slope of the input's surrogate is made of. "auto": a bit for "clip", nothing for "identity", x itself for
            "biper", else |u| in 255 levels (`binarize`'s "u8"); "exact": x where "auto" would take levels.

    The backward is that of scale F(W - c) and G(x - input_shift), F and G the surrogates' functions:
    dX = (dY scale sign(W)) G', dW = scale (dY^T sign(x)) F'. Saved are two bits an element of x and of W with "clip", and with
    another `weight_surrogate` W itself, which is alive anyway. "XNOR-Net", "ReActNet: Towards Precise Binary Neural Network with
    Generalized Activation Functions"; surrogates: `fastloss.quant.surrogates`. Raises ValueError and TypeError.
    """
    check_weight(weight)
    check_linear(x, weight.shape[1], weight.shape[0], bias)
    if save not in SAVES:
        raise ValueError(f"save must be one of {', '.join(SAVES)}, got {save!r}")
    scale, shift, _ = _statistics(weight.detach() if detach else weight, scale, center, None, 0, detach)
    many = any(p is not None and p.numel() != 1 for p in (scale, shift))
    weight_layout = layout_of(weight, 0 if many else None)
    flat = rows_of(x)
    input_layout = layout_of(flat, -1 if input_shift is not None and input_shift.numel() != 1 else None)
    scale = check_parameter("scale", scale, weight_layout, weight)
    shift = check_parameter("shift", shift, weight_layout, weight)
    input_shift = check_parameter("input_shift", input_shift, input_layout, flat)
    if forward_mode_active():  # `binarize` has a composition that it takes
        signs = binarize(flat, input_surrogate, shift=input_shift, dim=-1)
        dense = binarize(weight, weight_surrogate, scale=scale, shift=shift)
        assert isinstance(signs, Tensor) and isinstance(dense, Tensor)
        y = signs.to(wide(x)) @ dense.to(wide(x)).T
        y = y if bias is None else y + bias
        return y.to(autocast_dtype(x)).reshape(*x.shape[:-1], weight.shape[0])
    sides = _side(input_surrogate, input_layout, save == "auto"), _side(weight_surrogate, weight_layout, False)
    apply = (_BinaryLinearFunctorch if functorch_active() else _BinaryLinear).apply
    y = apply(flat, weight.contiguous(), bias, scale, shift, input_shift, *sides, autocast_dtype(x))[0]
    return y.reshape(*x.shape[:-1], weight.shape[0])
