"""The step of a quantiser found by shrinking its range."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fake_quant import lsq_levels


def search_step(
    x: Tensor, bits: int, *, symmetric: bool = True, dim: int | None = None, candidates: int = 80, shrink: float = 0.01,
    power: float = 2.4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scale, offset) of the quantiser with the least sum |x - x'|^power among ranges shrunk by 0, 1, .. times `shrink`.

        symmetric:  scale = r max|x| / Qp, offset = 0
        else:       scale = r (max x - min x) / (Qp - Qn), offset = r min x - Qn scale
        r = 1 - i shrink, i < candidates;   x' = fake_quant(x, scale, offset=offset), Qn, Qp = -2^(bits-1), 2^(bits-1) - 1

    Args:
        x: any shape, floating. dim: one step for each index of this dimension; None: one for all.
        candidates, shrink, power: 80, 0.01 and 2.4 start EQ-Net ("EQ-Net: Elastic Quantization Neural Networks"); 7, 0.1
            and 0.5 are the activation search of "Q-VLM: Post-training Quantization for Large Vision-Language Models".

    Returns:
        float32 [1] or [x.shape[dim]] (float64 for float64) each; what is 0 throughout has step 1. No gradient. The largest
        range wins where several are as good.

    Raises ValueError and TypeError.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if not x.numel():
        raise ValueError(f"x must hold a number, got {list(x.shape)}")
    if dim is not None and not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be in [{-x.dim()}, {x.dim()}), got {dim}")
    if candidates < 1 or not 0 < shrink or not (candidates - 1) * shrink < 1:
        raise ValueError(f"candidates >= 1 and shrink > 0 must leave a range, got {candidates} times {shrink}")
    if not power > 0:
        raise ValueError(f"power must be > 0, got {power}")
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    flat = wide.reshape(1, -1) if dim is None else wide.movedim(dim, 0).reshape(x.shape[dim], -1)
    levels = lsq_levels(bits)
    low, high = flat.amin(1), flat.amax(1)
    widest = torch.maximum(-low, high) / levels.high if symmetric else (high - low) / (levels.high - levels.low)
    widest = torch.where(widest > 0, widest, torch.ones_like(widest))
    best = torch.full_like(widest, torch.inf, dtype=torch.float64)
    found, shift = widest.clone(), torch.zeros_like(widest)
    for i in range(candidates):
        left = 1 - i * shrink
        scale = widest * left
        offset = torch.zeros_like(scale) if symmetric else low * left - levels.low * scale
        v = ((flat - offset[:, None]) / scale[:, None]).clamp(levels.low, levels.high).round()
        error = (flat - (v * scale[:, None] + offset[:, None])).abs().pow(power).sum(1, dtype=torch.float64)
        better = error < best
        best = torch.where(better, error, best)
        found, shift = torch.where(better, scale, found), torch.where(better, offset, shift)
    return found, shift
