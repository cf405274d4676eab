"""The dynamic sign of CSCE-Net: hash bits that are not sure of their sign go to the smaller side."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import wide

#: Thresholds are clamped to this magnitude.
LIMIT = 0.01


def dynamic_sign(v: Tensor, threshold: Tensor | float, *, limit: float = LIMIT) -> Tensor:
    """sign(v) where |v| >= t, elsewhere the sign that is the rarer in its row: -1 if more than half of v > 0, else +1.

    t = clamp(threshold, -limit, limit); a t <= 0 leaves sign(v).

    Args:
        v: [..., K]; float32, float16, bfloat16, float64. NaN is -1.
        threshold: one number, or one for each row [...] or [..., 1] (the network predicts it).
        limit: the largest threshold.

    Returns +1 and -1 in v's dtype. No gradient in v or threshold, as in the authors' code; their 32 is K / 2 at 64 bits.
    "Cross-Scale Context Extracted Hashing for Fine-Grained Image Binary Encoding". Raises ValueError and TypeError.
    """
    if not isinstance(v, Tensor) or not v.is_floating_point() or v.dim() == 0:
        raise TypeError("v must be a floating tensor [..., K]")
    if not limit >= 0:
        raise ValueError(f"limit must be at least 0, got {limit}")
    x = v.detach().to(wide(v))
    t = torch.as_tensor(threshold, dtype=x.dtype, device=x.device).detach().clamp(-limit, limit)
    if t.numel() == 1:
        t = t.reshape(())
    elif t.shape == v.shape[:-1]:
        t = t[..., None]
    elif t.shape != (*v.shape[:-1], 1):
        raise ValueError(f"threshold must be one number, or {list(v.shape[:-1])}, got {list(t.shape)}")
    many = (x > 0).sum(-1, keepdim=True) * 2 > v.shape[-1]
    return torch.where(torch.where(x.abs() < t, ~many, x >= 0), 1.0, -1.0).to(v.dtype)
