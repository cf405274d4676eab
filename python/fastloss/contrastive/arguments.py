"""Checks and small sums that several contrastive losses share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import can_look
from ..pairs.arguments import EPS, Temperature, positive_numbers


def check_same_shape(q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless row i of q can belong to row i of k."""
    if q.dim() != 2 or q.shape != k.shape:
        raise ValueError(f"q and k must have one shape [B, D], got {list(q.shape)} and {list(k.shape)}")


def check_labels(x: Tensor, labels: Tensor, name: str = "labels") -> None:
    """Raise unless there is one integer label for each row of x [B, D]."""
    if x.dim() != 2:
        raise ValueError(f"embeddings must be [B, D], got {list(x.shape)}")
    if labels.shape != x.shape[:1]:
        raise ValueError(f"{name} must have shape [{x.shape[0]}], got {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")


def check_ids(name: str, ids: Tensor, count: int, length: int) -> None:
    """Raise unless ids are `length` integers in [0, count); the range raises IndexError, on a CPU."""
    if ids.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}], got {list(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if can_look(ids) and ids.numel():
        low, high = (int(i) for i in ids.aminmax())
        if low < 0 or high >= count:
            raise IndexError(f"{name} must be in [0, {count}), got ids from {low} to {high}")


def check_weight(name: str, value: float) -> None:
    """Raise ValueError for a weight, margin or penalty that is negative or not finite."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and >= 0, got {value}")


def check_share(share: Tensor) -> None:
    """Raise ValueError for shares that are not in [0, 1], on a CPU."""
    if can_look(share) and share.numel() and not bool(((share >= 0) & (share <= 1)).all()):
        low, high = (float(x) for x in share.detach().aminmax())
        raise ValueError(f"share must be in [0, 1], got numbers from {low} to {high}")


def check_scale(name: str, scale: Temperature) -> None:
    """Raise ValueError for what is not one positive number (seen on a CPU)."""
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"{name} must be a number or one element, got {list(scale.shape)}")
    positive_numbers(name, scale)


def wide(x: Tensor) -> Tensor:
    """x in the dtype of statistics: float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor, normalize: bool = True) -> Tensor:
    """The rows of x, in the dtype of statistics, divided by their norms where `normalize`; a zero row stays zero."""
    return F.normalize(wide(x), dim=-1, eps=EPS) if normalize else wide(x)


def row_dots(q: Tensor, k: Tensor, normalize: bool = False) -> Tensor:
    """<q_i, k_i>, [B]: cosines where `normalize`."""
    return (unit(q, normalize) * unit(k, normalize)).sum(-1)


def log_sum_exp(values: Tensor) -> Tensor:
    """log sum e^values of a vector, a number; -inf with zero gradient where all are -inf (torch's has NaN there)."""
    largest = values.detach().amax() if values.numel() else values.new_full((), -float("inf"))
    shift = torch.where(largest.isinf(), 0.0, largest)
    total = torch.where(values == -float("inf"), 0.0, (values - shift).exp()).sum()
    some = total != 0
    return torch.where(some, torch.where(some, total, 1.0).log() + shift, -float("inf"))
