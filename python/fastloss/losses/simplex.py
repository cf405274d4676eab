"""Sparse alternatives to softmax: projection on k-sparse points of the simplex, and the soft top-k conjugate."""

from __future__ import annotations

import torch
from torch import Tensor

from . import catalogue


def _check(x: Tensor, k: int) -> None:
    if not x.is_floating_point():
        raise TypeError(f"takes a floating dtype, got {x.dtype}")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if x.dim() < 1 or not 1 <= k <= x.shape[-1]:
        raise ValueError(f"k must be from 1 to the last dimension {tuple(x.shape[-1:])}, got {k}")


@catalogue.entry(
    formula="argmin_{p in simplex, at most k nonzeros} ||p - x||^2 = relu(x_j - theta) on the k largest",
    gradient="g_j - mean of g over the support, 0 elsewhere",
    source="Sparsity-Constrained Optimal Transport",
    published="POT's projection prints shapes and its conjugate writes into its input",
)
def sparse_projection(x: Tensor, k: int) -> Tensor:
    """Euclidean projection of x [..., V] on points of the simplex with at most k nonzeros. Differentiable.

    Computed in float32 at least, in the dtype of x. NaN where the largest x is NaN or infinite. Raises TypeError for a
    dtype that is not floating and a k that is no int, ValueError for k outside 1..V.
    """
    _check(x, k)
    top, index = x.to(torch.promote_types(x.dtype, torch.float32)).topk(k, -1)
    top = top - top[..., :1].detach()  # a shift changes nothing but the digits of theta
    total = top.cumsum(-1) - 1
    rank = torch.arange(1, k + 1, dtype=top.dtype, device=x.device)
    inside = top.detach() * rank > total.detach()
    support = inside.sum(-1, keepdim=True).clamp(min=1)  # sorted: a prefix, empty for NaN alone
    theta = total.gather(-1, support - 1) / support.to(top.dtype)
    return torch.zeros_like(x).scatter(-1, index, torch.relu(top - theta).to(x.dtype))


@catalogue.entry(
    formula="sum over the k largest of relu(x)^2 / (2 gamma)",
    gradient="relu(x_j) / gamma on the k largest, 0 elsewhere",
    source="Sparsity-Constrained Optimal Transport",
)
def soft_top_k(x: Tensor, k: int, *, gamma: float = 1.0) -> Tensor:
    """The conjugate of the k-sparse quadratic regulariser, [...]; its gradient is a soft choice of k entries of x [..., V].

    In float32 at least. Raises as `sparse_projection`, and ValueError for gamma <= 0.
    """
    _check(x, k)
    if not gamma > 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")
    top = x.topk(k, -1).values
    return (torch.relu(top.to(torch.promote_types(x.dtype, torch.float32))) ** 2).sum(-1) / (2 * gamma)
