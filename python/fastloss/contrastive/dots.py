"""Similarities that are a list, not a matrix: of a row with its own partner, and with candidates of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs.arguments import EPS, Temperature, positive_numbers
from ..pairs.edges import edge_dot
from ..pairs.statistics import INF


def check_pair(q: Tensor, k: Tensor, names: str = "q and k") -> None:
    """Raise ValueError for what is not two tensors of one shape [B, D]."""
    if q.dim() != 2 or q.shape != k.shape:
        raise ValueError(f"{names} must have one shape [B, D], got {list(q.shape)} and {list(k.shape)}")


def scale_of(temperature: Temperature, name: str = "temperature") -> Temperature:
    """1 / temperature. Raises ValueError for one that is not positive, where looking costs no wait for a device."""
    positive_numbers(name, temperature)
    return 1 / temperature


def unit(x: Tensor) -> Tensor:
    """x divided by its norms along the last dimension, in the dtype of x."""
    return torch.nn.functional.normalize(x, dim=-1)


def inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| along the last dimension, float32 (float64 for float64); zero vectors get a cosine of 0."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype).clamp_min(EPS).reciprocal()


def edge_similarity(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, normalize: bool) -> Tensor:
    """<q_r, k_c> of each edge, [E], or its cosine; differentiable."""
    dots = edge_dot(q, k, rows, columns)
    return dots * inverse_norm(q)[rows] * inverse_norm(k)[columns] if normalize else dots


def own_similarity(q: Tensor, k: Tensor, normalize: bool) -> Tensor:
    """<q_i, k_i>, [B], or the cosines."""
    own = torch.arange(q.shape[0], device=q.device)
    return edge_similarity(q, k, own, own, normalize)


def private_similarity(q: Tensor, candidates: Tensor, normalize: bool) -> Tensor:
    """<q_i, c_im> of candidates [B, M, D] that belong to row i alone, [B, M], or the cosines."""
    b, m, d = candidates.shape
    edges = torch.arange(b * m, device=q.device)
    return edge_similarity(q, candidates.reshape(b * m, d), edges // max(m, 1), edges, normalize).view(b, m)


def masked_lse(z: Tensor, keep: Tensor | None = None) -> Tensor:
    """log-sum-exp over the last dimension of what is kept: -inf, with zero gradient, where there is nothing."""
    if keep is None:
        keep = torch.ones_like(z, dtype=torch.bool)
    if not z.shape[-1]:
        return z.sum(-1) - INF
    some = keep.any(-1)
    safe = torch.where(some.unsqueeze(-1), z.masked_fill(~keep, -INF), 0.0)
    return torch.where(some, torch.logsumexp(safe, -1), -INF)


def segment_lse(z: Tensor, owner: Tensor, count: int) -> Tensor:
    """log-sum-exp of the z [E] that belong to each of `count` rows, [count]; -inf, with zero gradient, where there is none."""
    largest = z.new_full((count,), -INF).scatter_reduce(0, owner, z.detach(), "amax")
    shift = torch.where(largest == -INF, 0.0, largest)
    total = z.new_zeros(count).index_add(0, owner, (z - shift[owner]).exp())
    some = total > 0
    return torch.where(some, torch.where(some, total, 1.0).log() + shift, -INF)


def finite_softplus(x: Tensor) -> Tensor:
    """log(1 + e^x): 0, with zero gradient, at x = -inf (a row without negatives)."""
    empty = x == -INF
    x = torch.where(empty, 0.0, x)
    return torch.where(empty, 0.0, torch.relu(x) + torch.log1p(torch.exp(-x.abs())))
