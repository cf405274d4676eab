"""Bits dealt to the columns of a weight by what their rounding costs (BAQ)."""

from __future__ import annotations

import torch
from torch import Tensor

#: Loss of a column against its bits: halving a loss costs 1 / _SLOPE bits.
_SLOPE = 1.95


def allocate_levels(losses: Tensor, bits: float, slope: float = _SLOPE) -> Tensor:
    """How many levels each column gets, int64 [K], at least 1: R_j = log2(levels_j) bits.

        levels_j = round(max(1, (l_j / G)^(1 / slope) 2^bits)),   G the geometric mean of the losses

    so the mean of R_j is `bits` up to rounding. (The released code writes G as the ratio of the geometric to the
    arithmetic mean, times the arithmetic mean.) A column without a loss gets one level and is not in G.

    Args:
        losses: [K] >= 0, `gptq_columns` at `bits` for all. bits: > 0, the mean wanted.
        slope: the loss of a column falls as 2^(-slope R).

    Raises ValueError. Source: "BAQ: Efficient Bit Allocation Quantization for Large Language Models".
    """
    if losses.dim() != 1 or not bool((losses.isfinite() & (losses >= 0)).all()):
        raise ValueError(f"losses must be [K], finite and >= 0, got {list(losses.shape)}")
    if not bits > 0 or not slope > 0:
        raise ValueError(f"bits and slope must be > 0, got {bits} and {slope}")
    log = losses.double().log2()
    some = losses > 0
    if not bool(some.any()):
        return torch.ones_like(losses, dtype=torch.int64)
    share = (log - log[some].mean()) / slope + bits
    return torch.where(some, (2.0**share).clamp(min=1.0).round(), 1.0).long()


def gptq_columns(weight: Tensor, hessian: Tensor, levels: Tensor | int, damp: float = 0.01) -> tuple[Tensor, Tensor]:
    """GPTQ with a number of levels for each column: (rounded weight [R, K] in the dtype given, losses float64 [K]).

        U = the upper Cholesky factor of (H + damp mean(diag H) I)^-1,   d_j = U_jj
        column j, with what the columns before left:  q = min + step round((w - min) / step),  step = (max - min) / (levels_j - 1)
        l_j = sum_i (w_ij - q_ij)^2 / (2 d_j^2);   the columns behind: w_k <- w_k - (w_j - q_j) U_jk / d_j

    Minimum and maximum are those of the column as it is when its turn comes; a column of one level becomes its mean. In
    float64.

    Args:
        weight: [R, K] floating. hessian: [K, K] symmetric, sum x x^T over calibration inputs (any factor before it scales
            the losses alone). levels: int64 [K] from `allocate_levels`, or one number, >= 1.

    Raises ValueError and TypeError. Source: "BAQ: Efficient Bit Allocation Quantization for Large Language Models", on
    GPTQ's pass.
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating, got {weight.dtype}")
    if weight.dim() != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"weight must be [R, K] and hessian [K, K], got {list(weight.shape)} and {list(hessian.shape)}"
        )
    columns = weight.shape[1]
    levels = torch.as_tensor(levels).expand(columns) if not isinstance(levels, Tensor) else levels
    if levels.shape != (columns,) or levels.is_floating_point() or (columns and int(levels.min()) < 1):
        raise ValueError(f"levels must be {columns} integers >= 1, got {levels.dtype} {list(levels.shape)}")
    if not damp >= 0:
        raise ValueError(f"damp must be >= 0, got {damp}")
    left, h = weight.detach().double().clone(), hessian.detach().double()
    if not weight.numel():
        return weight.detach().clone(), left.new_zeros(columns)
    h = h + damp * h.diagonal().mean() * torch.eye(columns, dtype=h.dtype, device=h.device)
    try:
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"hessian must be positive definite once damped by {damp}: {error}") from None
    losses = left.new_zeros(columns)
    for j in range(columns):
        w, d = left[:, j].clone(), upper[j, j]
        q = _rounded(w, int(levels[j]))
        losses[j] = (w - q).square().sum() / (2 * d * d)
        left[:, j + 1 :] -= ((w - q) / d)[:, None] * upper[j, j + 1 :]
        left[:, j] = q
    return left.to(weight.dtype), losses


def _rounded(w: Tensor, levels: int) -> Tensor:
    if levels == 1:
        return w.mean().expand_as(w)
    low, high = w.aminmax()
    step = (high - low) / (levels - 1)
    return low + step * ((w - low) / step).round() if step > 0 else w
