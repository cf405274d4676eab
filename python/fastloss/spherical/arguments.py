"""Checks of what a user gives to `SphericalLinear`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import SphericalLinear

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_size(
    in_features: int, num_classes: int, accumulate: int, stabilize_period: int, bias_input: float | None, std: float
) -> None:
    """Raise ValueError for what makes no layer."""
    counts = {
        "in_features": in_features, "num_classes": num_classes, "accumulate": accumulate,
        "stabilize_period": stabilize_period,
    }  # fmt: skip
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {count!r}")
    if bias_input is not None and not (math.isfinite(bias_input) and bias_input != 0):
        raise ValueError(f"bias_input must be a finite number other than 0, or None for no bias; got {bias_input}")
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"std must be a finite number > 0, got {std}")


def check_rates(lr: float, weight_decay: float) -> None:
    """Raise ValueError for rates with which no step can be taken."""
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be a finite number >= 0, got {lr}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0 and lr * weight_decay < 1):
        below = 1 / lr if lr else math.inf
        raise ValueError(f"weight_decay must be >= 0 and below 1 / lr = {below}, got {weight_decay}")


def check_input(layer: SphericalLinear, input: Tensor, target: Tensor | None) -> bool:
    """Raise for what is no input or target; whether the target lists several classes a row."""
    if input.dim() < 1 or input.shape[-1] != layer.in_features:
        raise ValueError(f"input must have shape [..., {layer.in_features}], got {tuple(input.shape)}")
    if not input.is_floating_point():
        raise TypeError(f"input must be floating, got {input.dtype}")
    if input.device != layer.v.device:
        raise ValueError(f"input is on {input.device}, the layer on {layer.v.device}")
    if target is None:
        return False
    if target.dtype not in ID_DTYPES:
        raise TypeError(f"target must hold class ids (an integer dtype), got {target.dtype}")
    rows = input.shape[:-1]
    listed = target.dim() == input.dim() and target.shape[:-1] == rows and target.shape[-1] > 0
    if not listed and target.shape != rows:
        raise ValueError(f"target must have shape {tuple(rows)} or {(*rows, 'K')}, got {tuple(target.shape)}")
    if target.device != input.device:
        raise ValueError(f"target is on {target.device}, the input on {input.device}")
    wrong = (target != layer.ignore_index) & ((target < 0) | (target >= layer.num_classes))
    if wrong.any():
        raise IndexError(
            f"class ids must be in [0, {layer.num_classes}) or ignore_index={layer.ignore_index}, "
            f"got {int(target[wrong][0])}"
        )
    return listed
