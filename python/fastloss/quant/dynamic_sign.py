"""The dynamic sign of CSCE-Net: hash bits that are not sure of their sign go to the smaller side."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Pack, Save, Surrogate
from .layout import rows_of
from .ops import wide

_ops = torch.ops.fastloss

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
    if not isinstance(v, Tensor) or not v.is_floating_point():
        raise TypeError(f"v must be a floating tensor, got {v.dtype if isinstance(v, Tensor) else type(v).__name__}")
    if not v.dim():
        raise ValueError("v must be [..., K], got one number")
    if not limit >= 0:
        raise ValueError(f"limit must be at least 0, got {limit}")
    if v.numel() == 0:
        return torch.empty_like(v, requires_grad=False)
    x = rows_of(v.detach())
    t = torch.as_tensor(threshold, dtype=wide(v), device=v.device).detach().clamp(-limit, limit)
    if t.numel() != 1 and t.shape not in (v.shape[:-1], (*v.shape[:-1], 1)):
        raise ValueError(f"threshold must be one number, or {list(v.shape[:-1])}, got {list(t.shape)}")
    positive = _ops.pack_bits.default(x, int(Pack.TERNARY), None, t.new_zeros(1, 1), 0, 0, 2)[1][1]
    # All doubtful numbers of a row get one sign, so the bit is x >= t, or x > -t.
    t = t.reshape(-1)
    above = torch.where(positive * 2 > x.shape[1], t, torch.nextafter(-t, torch.full_like(t, torch.inf)))
    cut = torch.where(t > 0, above, 0.0)
    plain = (int(Surrogate.IDENTITY), 0.0, 0.0, int(Save.DENSE))
    return _ops.binarize.default(x, cut, None, len(x), x.shape[1], *plain)[0].reshape(v.shape)
