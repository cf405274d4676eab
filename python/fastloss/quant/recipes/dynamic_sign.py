"""Signs whose doubtful bits go to the minority (CSCE-Net)."""

from __future__ import annotations

import torch
from torch import Tensor


def dynamic_sign(v: Tensor, threshold: Tensor | float) -> Tensor:
    """+1 or -1 in the dtype of v: sign(v) where |v| >= t; elsewhere -1 if more than half of the row is > 0, else +1.

    So a number near 0 gets the sign that its row has less of, and the bits of a code stay balanced. No gradient: the paper
    trains v by 1 - cos(2 hardtanh_{1/2}(v), signs), with the signs as constants. sign(0) = +1, NaN is -1.

    Args:
        v: [..., K] floating. threshold: t, one number, or [...], one for each row (the paper's is a linear layer of the
            row, clamped to +-0.01; where it is negative every bit is its sign).

    Raises ValueError and TypeError. Source: "Cross-Scale Context Extracted Hashing for Fine-Grained Image Binary Encoding"
    (32 in place of K / 2, for 64 bits).
    """
    if not v.is_floating_point():
        raise TypeError(f"v must be floating, got {v.dtype}")
    if not v.dim():
        raise ValueError("v must be [..., K], got one number")
    t = torch.as_tensor(threshold, device=v.device).detach()
    if t.dim() and t.shape != v.shape[:-1]:
        raise ValueError(f"threshold must be one number or {list(v.shape[:-1])}, got {list(t.shape)}")
    v = v.detach()
    most = (v > 0).sum(-1, keepdim=True) * 2 > v.shape[-1]
    one = torch.ones_like(v)
    return torch.where(
        v.abs() < (t[..., None] if t.dim() else t), torch.where(most, -one, one), torch.where(v >= 0, one, -one)
    )
