"""Sparse alternatives to softmax: projection on k-sparse points of the simplex, and the soft top-k conjugate."""

from __future__ import annotations

import torch
from torch import Tensor

from . import catalogue


def _check(x: Tensor, k: int) -> None:
    if not x.is_floating_point():
        raise TypeError(f"takes a floating dtype, got {x.dtype}")
    if x.dim() < 1 or not 1 <= k <= x.shape[-1]:
        raise ValueError(f"k must be from 1 to the last dimension {tuple(x.shape[-1:])}, got {k}")


@catalogue.entry(
    formula="argmin_{p in simplex, at most k nonzeros} ||p - x||^2 = relu(x_j - theta) on the k largest",
    gradient="g_j - mean of g over the support, 0 elsewhere",
    source="Sparsity-Constrained Optimal Transport",
    published="POT's projection prints shapes and its conjugate writes into its input",
)
def sparse_projection(x: Tensor, k: int) -> Tensor:
    """Euclidean projection of x [..., V] on points of the simplex with at most k nonzeros. Differentiable."""
    _check(x, k)
    top, index = x.topk(k, -1)
    total = top.cumsum(-1) - 1
    rank = torch.arange(1, k + 1, dtype=x.dtype, device=x.device)
    support = (top.detach() * rank > total.detach()).sum(-1, keepdim=True)  # sorted: a prefix
    theta = total.gather(-1, support - 1) / support.to(x.dtype)
    return torch.zeros_like(x).scatter(-1, index, torch.relu(top - theta))


@catalogue.entry(
    formula="sum over the k largest of relu(x)^2 / (2 gamma)",
    gradient="relu(x_j) / gamma on the k largest, 0 elsewhere",
    source="Sparsity-Constrained Optimal Transport",
)
def soft_top_k(x: Tensor, k: int, *, gamma: float = 1.0) -> Tensor:
    """The conjugate of the k-sparse quadratic regulariser, [...]; its gradient is a soft choice of k entries of x [..., V]."""
    _check(x, k)
    if not gamma > 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")
    return (torch.relu(x.topk(k, -1).values) ** 2).sum(-1) / (2 * gamma)
