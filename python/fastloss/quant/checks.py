"""What the arguments of the bit ops must be: checked before any backend reads by them (docs/design.md, "The bit
contract").

Each check raises TypeError or ValueError with what it got and what is taken. Kernels rely on them: they read by shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import Grad, Pack, Save, Surrogate, row_bytes

_MOST_PLANES = 4
_SURROGATES = tuple(kind.name.lower() for kind in Surrogate)
#: |value| of a number that planes make (docs/design.md).
_LARGEST = 127
#: Numbers of a pattern of parameters, and of a group of codes, that an index holds with room.
_LONGEST = 1 << 48


def _floating(name: str, x: Tensor, dims: int) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating, got {x.dtype}")
    if x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension{'s' * (dims > 1)}, got {list(x.shape)}")


def _on_one_device(like: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != like.device:
            raise ValueError(f"{name} must be on {like.device}, got {t.device}")


def _has_shape(name: str, t: Tensor | None, dtype: torch.dtype | None, shape: Sequence[int]) -> None:
    if t is None:
        return
    if dtype is not None and t.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)}, got {list(t.shape)}")


def _table(name: str, t: Tensor | None, rows: int, columns: int, group: int) -> None:
    """[R or 1, G] of groups of columns."""
    groups = -(-columns // group) if group else 1
    if t is None:
        return
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating, got {t.dtype}")
    if t.dim() != 2 or t.shape[0] not in (1, rows) or t.shape[1] != groups:
        raise ValueError(f"{name} must be [{rows} or 1, {groups}], got {list(t.shape)}")


def _group_of_columns(group: int) -> None:
    if not 0 <= group <= _LONGEST:
        raise ValueError(f"group must be 0 (all columns) or the number of columns that share a scale, got {group}")


def pack_bits(
    x: Tensor, kind: int, center: Tensor | None, scale: Tensor | None, group: int, low: int, planes: int
) -> None:
    _floating("x", x, 2)
    if kind not in tuple(Pack):
        raise ValueError(f"kind must be 0 (sign), 1 (ternary) or 2 (codes), got {kind}")
    if kind == Pack.CODES and not 1 <= planes <= _MOST_PLANES:
        raise ValueError(f"planes of codes must be 1 to {_MOST_PLANES}, got {planes}")
    if not -_LARGEST - 1 <= low <= _LARGEST:
        raise ValueError(f"low must be in [-{_LARGEST + 1}, {_LARGEST}], got {low}")
    _group_of_columns(group)
    _on_one_device(x, center=center, scale=scale)
    _table("center", center, x.shape[0], x.shape[1], group)
    _table("scale", scale, x.shape[0], x.shape[1], group)


def unpack_bits(
    planes: Tensor, columns: int, weights: Sequence[int], offset: int, scale: Tensor | None, group: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if not 1 <= len(weights) <= _MOST_PLANES:
        raise ValueError(f"weights must be 1 to {_MOST_PLANES}, one for each plane, got {list(weights)}")
    if columns < 0:
        raise ValueError(f"columns must be at least 0, got {columns}")
    width = row_bytes(columns)
    if planes.dtype != torch.uint8 or planes.dim() != 3 or planes.shape[::2] != (len(weights), width):
        raise ValueError(
            f"{columns} columns and {len(weights)} weights want uint8 planes [{len(weights)}, R, {width}], "
            f"got {planes.dtype} {list(planes.shape)}"
        )
    _group_of_columns(group)
    _on_one_device(planes, scale=scale)
    _table("scale", scale, planes.shape[1], columns, group)


def _parameters(x: Tensor, groups: int, inner: int, **given: Tensor | None) -> None:
    """The pattern of parameters fits x, and each has 1 or `groups` numbers."""
    n = x.numel()
    if groups < 0 or inner < 0 or groups * inner > _LONGEST or (n and not groups):
        raise ValueError(f"groups and inner must be at least 1, got {groups} and {inner}")
    if groups > 1 and n and (not inner or n % (groups * inner)):
        raise ValueError(f"groups * inner must divide the {n} numbers of x, got {groups} * {inner}")
    _on_one_device(x, **given)
    for name, p in given.items():
        if p is None:
            continue
        if not p.is_floating_point():
            raise TypeError(f"{name} must be floating, got {p.dtype}")
        if p.numel() not in (1, groups):
            raise ValueError(f"{name} must have 1 or {groups} numbers, got {list(p.shape)}")


def surrogate_numbers(surrogate: int, p0: float, p1: float, coded: bool = False) -> None:
    """ValueError for a surrogate that there is not, or numbers that it does not take."""
    if not 0 <= surrogate < len(_SURROGATES):
        raise ValueError(f"surrogate must be 0 to {len(_SURROGATES) - 1}, got {surrogate}")
    if surrogate not in (Surrogate.IDENTITY, Surrogate.APPROX) and not 0 < p0 < math.inf:
        raise ValueError(f"p0 of {_SURROGATES[surrogate]} must be a positive finite number, got {p0}")
    if surrogate == Surrogate.RESTE and not (p0 >= 1 and 0 < p1 < math.inf):
        raise ValueError(f"reste takes p0 >= 1 (its power) and p1 > 0 (its limit), got {p0} and {p1}")
    if surrogate == Surrogate.FDA and not 0 <= p1 <= 1000:
        raise ValueError(f"p1 of fda, its terms, must be in [0, 1000], got {p1}")
    if coded and surrogate in (Surrogate.IDENTITY, Surrogate.BIPER):
        raise ValueError(f"codes are of a slope that ends somewhere; that of {_SURROGATES[surrogate]} does not")


def binarize(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, groups: int, inner: int, surrogate: int, p0: float,
    p1: float, save: int,
) -> None:  # fmt: skip
    _floating("x", x, 2)
    _parameters(x, groups, inner, shift=shift, scale=scale)
    surrogate_numbers(surrogate, p0, p1, bool(save & Save.CODES))


def binarize_backward(
    grad: Tensor, x: Tensor | None, signs: Tensor | None, mask: Tensor | None, codes: Tensor | None,
    shift: Tensor | None, scale: Tensor | None, groups: int, inner: int, surrogate: int, p0: float, p1: float, needs: int,
) -> None:  # fmt: skip
    _floating("grad", grad, 2)
    rows, columns = grad.shape
    _parameters(grad, groups, inner, shift=shift, scale=scale)
    surrogate_numbers(surrogate, p0, p1, codes is not None)
    _on_one_device(grad, x=x, signs=signs, mask=mask, codes=codes)
    if x is not None:
        _floating("x", x, 2)
    _has_shape("x", x, None, grad.shape)
    _has_shape("signs", signs, torch.uint8, (rows, row_bytes(columns)))
    _has_shape("mask", mask, torch.uint8, (rows, row_bytes(columns)))
    _has_shape("codes", codes, torch.uint8, grad.shape)
    slopes = surrogate == Surrogate.IDENTITY or any(t is not None for t in (x, mask, codes))
    if (needs & (Grad.X | Grad.SHIFT) and not slopes) or (needs & Grad.SCALE and x is None and signs is None):
        raise ValueError(
            "the gradient of x or shift needs x, mask or codes, that of scale x or signs; got none of them"
        )


def fake_quant(
    x: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, groups: int, inner: int, *_: Any
) -> None:
    _floating("x", x, 2)
    _parameters(x, groups, inner, scale=scale, offset=offset, zero_point=zero_point)


def fake_quant_backward(grad: Tensor, x: Tensor, *quantizer: Any) -> None:
    fake_quant(x, *quantizer)
    _floating("grad", grad, 2)
    _has_shape("grad", grad, None, x.shape)
    _on_one_device(x, grad=grad)


def _codec(group: int, bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if not 1 <= group <= _LONGEST or group * bits % 8:
        raise ValueError(f"group must be at least 1, and even for 4 bits, got {group}")


def quantize_groups(
    x: Tensor, group: int, bits: int, low: Tensor | None, high: Tensor | None, seed: Tensor | None
) -> None:
    _floating("x", x, 1)
    _codec(group, bits)
    _on_one_device(x, low=low, high=high, seed=seed)
    if (low is None) != (high is None):
        raise ValueError("low and high must both be given, or neither")
    if low is not None and high is not None:
        _floating("low", low, 1)
        _floating("high", high, 1)
        if not low.numel() or low.shape != high.shape:
            raise ValueError(f"low and high must have as many numbers, got {list(low.shape)} and {list(high.shape)}")
    if seed is not None:
        _has_shape("seed", seed.reshape(-1), torch.int64, (1,))


def dequantize_groups(
    codes: Tensor, low: Tensor, step: Tensor, n: int, group: int, bits: int, dtype: torch.dtype
) -> None:
    _codec(group, bits)
    _on_one_device(codes, low=low, step=step)
    _floating("low", low, 1)
    _floating("step", step, 1)
    _has_shape("step", step, None, low.shape)
    _has_shape("codes", codes, torch.uint8, (low.numel(), group * bits // 8))
    if not 0 <= n <= low.numel() * group:
        raise ValueError(f"n must be 0 to the {low.numel()} * {group} numbers of the groups, got {n}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating, got {dtype}")
