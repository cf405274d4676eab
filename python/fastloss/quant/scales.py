"""First values of a learned step, from the numbers it will quantise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .fake_quant import lsq_levels, seq_levels
from .layout import Layout, layout_of

#: A step of 0 would make NaN of zeros.
SMALLEST_STEP = 1e-8


def _by_parameter(x: Tensor, dim: int | None, group: int) -> Tensor:
    """x as [parameters, numbers that share one], float32 (float64 for float64)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if not x.numel():
        raise ValueError(f"x must hold a number, got shape {list(x.shape)}")
    groups, inner = layout_of(x, dim, group)
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    if Layout(groups, inner) == Layout():
        return wide.reshape(1, -1)
    return wide.reshape(-1, groups, inner).transpose(0, 1).reshape(groups, -1)


def lsq_scale(x: Tensor, bits: float, signed: bool = True, dim: int | None = None, group: int = 0) -> Tensor:
    """2 mean|x| / sqrt(Qp), for unsigned levels twice that; Qp the largest level.

    "Learned Step Size Quantization"; the factor 4 of unsigned levels is that of "Binary and Ternary Natural Language
    Generation".

    Args:
        x: any shape, floating.
        bits, signed, dim, group: as in `fake_quant`.

    Returns [parameters], float32 (float64 for a float64 x), at least 1e-8. Raises ValueError and TypeError.
    """
    factor = (2.0 if signed else 4.0) / math.sqrt(lsq_levels(bits, signed).high)
    return (_by_parameter(x, dim, group).abs().mean(1) * factor).clamp(min=SMALLEST_STEP)


def absmax_scale(x: Tensor, bits: float, mode: str = "lsq", dim: int | None = None, group: int = 0) -> Tensor:
    """The largest magnitude on the largest level, max|x| / (2^(bits-1) - 1); for mode="seq" max|x| itself.

    The first steps of ParetoQ. Arguments and result as of `lsq_scale`.
    """
    if mode not in ("lsq", "seq"):
        raise ValueError(f'mode must be "lsq" or "seq", got {mode!r}')
    if mode == "seq":
        seq_levels(bits)
    largest = 1.0 if mode == "seq" else lsq_levels(bits).high
    return (_by_parameter(x, dim, group).abs().amax(1) / largest).clamp(min=SMALLEST_STEP)


def minmax_scale(x: Tensor, bits: float, dim: int | None = None, group: int = 0) -> tuple[Tensor, Tensor]:
    """(scale, offset) = ((max - min) / (2^bits - 1), min) for unsigned levels: the range is the outermost levels.

    Arguments and each result as of `lsq_scale`.
    """
    numbers = _by_parameter(x, dim, group)
    low, high = numbers.aminmax(dim=1)
    return ((high - low) / lsq_levels(bits, signed=False).high).clamp(min=SMALLEST_STEP), low


def searched_scale(
    x: Tensor, bits: float, signed: bool = True, dim: int | None = None, group: int = 0, *, power: float = 2.4,
    candidates: int = 80, shrink: float = 0.01,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scale, offset) of the least sum |y - x|^power among ranges shrunk by 0, 1, .. times `shrink`.

        signed:  scale = r max|x| / Qp, offset = 0;   else:  scale = r (max x - min x) / (2^bits - 1), offset = r min x
        r = 1 - i shrink, i < candidates;   y = fake_quant(x, scale, offset=offset)

    Args:
        x, bits, signed, dim, group: as of `lsq_scale`.
        candidates, shrink, power: 80, 0.01 and 2.4 start EQ-Net ("EQ-Net: Elastic Quantization Neural Networks"); 7, 0.1
            and 0.5 are the activation search of "Q-VLM: Post-training Quantization for Large Vision-Language Models".

    Each result as of `lsq_scale`. The largest range wins where several are as good. Raises ValueError and TypeError.
    """
    if candidates < 1 or not 0 < shrink or not (candidates - 1) * shrink < 1:
        raise ValueError(f"candidates >= 1 and shrink > 0 must leave a range, got {candidates} times {shrink}")
    if not power > 0:
        raise ValueError(f"power must be > 0, got {power}")
    levels, numbers = lsq_levels(bits, signed), _by_parameter(x, dim, group)
    low, high = numbers.aminmax(dim=1, keepdim=True)
    least = torch.zeros_like(low) if signed else low
    widest = (torch.maximum(-low, high) if signed else high - low) / levels.high
    best = torch.full_like(widest, torch.inf, dtype=torch.float64)
    scale, offset = widest.clamp(min=SMALLEST_STEP), least
    for i in range(candidates):
        left = 1 - i * shrink
        step, shift = (left * widest).clamp(min=SMALLEST_STEP), left * least
        y = ((numbers - shift) / step).clamp_(levels.low, levels.high).round_().mul_(step).add_(shift)
        loss = y.sub_(numbers).abs_().pow_(power).sum(1, keepdim=True, dtype=torch.float64)
        better = loss < best
        best, scale, offset = (
            torch.where(better, new, old) for new, old in ((loss, best), (step, scale), (shift, offset))
        )
    return scale[:, 0], offset[:, 0]
