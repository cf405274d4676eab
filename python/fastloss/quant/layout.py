"""Which number of a parameter belongs to which element of a tensor: (groups, inner) of docs/design.md, "The bit
contract"."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .ops import wide


class Layout(NamedTuple):
    """Flat element i has parameter (i div inner) mod groups."""

    groups: int = 1
    inner: int = 1


def layout_of(x: Tensor, dim: int | None = None, group: int = 0) -> Layout:
    """One parameter for all of x (dim None, group 0), one for each index of `dim`, or one for `group` neighbours of
    the last dimension."""
    if group:
        if dim is not None or group < 0 or not x.dim() or x.shape[-1] % group:
            raise ValueError(
                f"group must divide the last dimension, without dim; got group {group}, dim {dim} and shape {list(x.shape)}"
            )
        return Layout(x.numel() // group, group)
    if dim is None:
        return Layout()
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be in [{-x.dim()}, {x.dim()}), got {dim}")
    return Layout(x.shape[dim], math.prod(x.shape[dim % x.dim() + 1 :]))


def check_parameter(name: str, parameter: Tensor | None, layout: Layout, x: Tensor) -> Tensor | None:
    """The parameter flat, contiguous and in float32 (float64 for a float64 x)."""
    if parameter is None:
        return None
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(parameter).__name__}")
    if parameter.numel() not in (1, layout.groups):
        raise ValueError(f"{name} must hold 1 or {layout.groups} numbers, got {list(parameter.shape)}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, got {parameter.device}")
    return parameter.reshape(-1).to(wide(x))


def rows_of(x: Tensor) -> Tensor:
    """x as [rows, columns], contiguous."""
    if x.dim() == 2 and x.numel() and x.is_contiguous():
        return x
    return (
        x.reshape(-1, x.shape[-1] if x.dim() else 1).contiguous()
        if x.numel()
        else x.reshape(0, max(1, x.shape[-1] if x.dim() else 1))
    )
