"""The `reference` backend of `binarize` and `fake_quant`: plain PyTorch, any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..registry import kernel
from .contract import Grad, Save, Surrogate
from .ops import wide
from .reference_bits import pack, packed, unpack

#: Below this, ReSTE's power is replaced by a line.
RESTE_LINEAR = 0.1


def spread(parameter: Tensor | None, x: Tensor, groups: int, inner: int, absent: float) -> Tensor | float:
    """A parameter of `groups` numbers, or of one, laid over the elements of x in the dtype x is computed in."""
    if parameter is None:
        return absent
    if parameter.numel() == 1:
        return parameter.reshape(()).to(wide(x))
    index = torch.arange(x.numel(), device=x.device).reshape(x.shape) // max(inner, 1) % groups
    return parameter.to(wide(x))[index]


def group_sums(terms: Tensor, groups: int, inner: int) -> Tensor:
    """[groups]: the sum over the elements of each group."""
    if groups == 1 or not terms.numel():
        return terms.double().sum().expand(groups).to(terms.dtype)
    return terms.reshape(-1, groups, max(inner, 1)).double().sum((0, 2)).to(terms.dtype)


def limit(surrogate: int, p0: float, p1: float) -> float:
    """t: beyond it codes are 255."""
    return {
        Surrogate.CLIP: p0, Surrogate.APPROX: 1.0, Surrogate.RESTE: p1, Surrogate.SWISH: 10.0 / (p0 or 1.0), Surrogate.FDA: 1.0,
    }.get(Surrogate(surrogate), math.inf)  # fmt: skip


def slope(u: Tensor, surrogate: int, p0: float, p1: float) -> Tensor:
    """F'(u) of the surrogate (docs/design.md, "binarize")."""
    a, zero = u.abs(), torch.zeros_like(u)
    if surrogate == Surrogate.IDENTITY:
        return torch.ones_like(u)
    if surrogate == Surrogate.CLIP:
        return (a < p0).to(u.dtype)
    if surrogate == Surrogate.APPROX:
        return torch.where(a < 1, 2 - 2 * a, zero)
    if surrogate == Surrogate.RESTE:
        power = a.clamp(RESTE_LINEAR).pow((1 - p0) / p0) / p0
        line = RESTE_LINEAR ** (1 / p0) / RESTE_LINEAR
        return torch.where(a <= p1, torch.where(a <= RESTE_LINEAR, line, power), zero)
    if surrogate == Surrogate.BIPER:
        return p0 * torch.cos(p0 * u)
    if surrogate == Surrogate.SWISH:
        x = (p0 * a).clamp(max=80.0)  # the slope is 0 there in every dtype
        return torch.where(a.isnan(), zero, p0 * (2 - x * torch.tanh(x / 2)) / (1 + torch.cosh(x)))
    if surrogate == Surrogate.FDA:
        waves = sum((torch.cos((2 * i + 1) * p0 * u) for i in range(int(p1) + 1)), start=zero)
        return torch.where(a <= 1, 4 * p0 / math.pi * waves, zero)
    raise ValueError(f"surrogate must be 0..{len(Surrogate) - 1}, got {surrogate}")


@kernel("binarize", "reference")
def binarize(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, groups: int, inner: int, surrogate: int, p0: float,
    p1: float, save: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    u = x.to(wide(x)) - spread(shift, x, groups, inner, 0.0)
    positive = (torch.sin(p0 * u) if surrogate == Surrogate.BIPER else u) >= 0
    none = x.new_empty(0, dtype=torch.uint8)
    y = torch.where(positive, 1.0, -1.0).to(u.dtype) * spread(scale, x, groups, inner, 1.0)
    signs, popcounts = packed(positive) if save & Save.SIGNS else (none, none.int())
    t = limit(surrogate, p0, p1)
    codes = torch.where(u.abs() <= t, (u.abs() * 254 / t).round(), 255.0) if save & Save.CODES else none
    return (
        y.to(x.dtype) if save & Save.DENSE else x.new_empty(0),
        signs,
        popcounts,
        pack(slope(u, surrogate, p0, p1) != 0) if save & Save.MASK else none,
        codes.to(torch.uint8),
    )


@kernel("binarize_backward", "reference")
def binarize_backward(
    grad: Tensor, x: Tensor | None, signs: Tensor | None, mask: Tensor | None, codes: Tensor | None,
    shift: Tensor | None, scale: Tensor | None, groups: int, inner: int, surrogate: int, p0: float, p1: float, needs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g, columns = grad.to(wide(grad)), grad.shape[1]
    u = None if x is None else x.to(g.dtype) - spread(shift, x, groups, inner, 0.0)
    none = g.new_empty(0)
    dx = none
    if needs & (Grad.X | Grad.SHIFT):
        if mask is not None:
            factor = unpack(mask, columns).to(g.dtype)
        elif codes is not None and surrogate == Surrogate.CLIP:
            factor = (codes < 255).to(g.dtype)
        elif codes is not None:
            t = limit(surrogate, p0, p1)  # in double, or rounding would put code 254 beyond t, where the slope is 0
            at = (torch.arange(255, dtype=torch.float64, device=g.device) * (t / 254)).clamp(max=t)
            slopes = torch.nn.functional.pad(slope(at, surrogate, p0, p1), (0, 1)).to(g.dtype)
            factor = slopes[codes.long()]
        else:
            factor = slope(g if u is None else u, surrogate, p0, p1)
        dx = torch.where(factor == 0, 0.0, g * spread(scale, g, groups, inner, 1.0) * factor)
    dscale = none
    if needs & Grad.SCALE:
        if signs is not None:
            sign = unpack(signs, columns).to(g.dtype) * 2 - 1
        else:
            assert u is not None
            sign = torch.where((torch.sin(p0 * u) if surrogate == Surrogate.BIPER else u) >= 0, 1.0, -1.0).to(g.dtype)
        dscale = group_sums(g * sign, groups, inner)
    dshift = -group_sums(dx, groups, inner) if needs & Grad.SHIFT else none
    return dx.to(grad.dtype) if needs & Grad.X else grad.new_empty(0), dscale, dshift


def quantiser_levels(
    x: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, groups: int, inner: int, low: float,
    high: float, steps: float, shift: float, rounded: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(v, q, inside)."""
    zero = spread(zero_point, x, groups, inner, 0.0)
    below, above = torch.as_tensor(low - zero, device=x.device), torch.as_tensor(high - zero, device=x.device)
    v = (x.to(wide(x)) - spread(offset, x, groups, inner, 0.0)) / spread(scale, x, groups, inner, 1.0)
    q = ((v.clamp(below.to(v), above.to(v)) * steps - shift).round() + shift) / steps
    at = v.round() if rounded else v
    return v, q, (at >= below) & (at <= above)


@kernel("fake_quant", "reference")
def fake_quant(
    x: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, groups: int, inner: int, low: float,
    high: float, steps: float, shift: float, rounded: bool,
) -> Tensor:  # fmt: skip
    _, q, _ = quantiser_levels(x, scale, offset, zero_point, groups, inner, low, high, steps, shift, rounded)
    return (q * spread(scale, x, groups, inner, 1.0) + spread(offset, x, groups, inner, 0.0)).to(x.dtype)


@kernel("fake_quant_backward", "reference")
def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, groups: int, inner: int,
    low: float, high: float, steps: float, shift: float, rounded: bool, needs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g, none = grad.to(wide(grad)), grad.new_empty(0, dtype=wide(grad))
    v, q, inside = quantiser_levels(x, scale, offset, zero_point, groups, inner, low, high, steps, shift, rounded)
    return (
        torch.where(inside, g, 0.0).to(grad.dtype) if needs & Grad.X else grad.new_empty(0),
        group_sums(g * torch.where(inside, q - v, q), groups, inner) if needs & Grad.SCALE else none,
        group_sums(torch.where(inside, 0.0, g), groups, inner) if needs & Grad.SHIFT else none,
    )
