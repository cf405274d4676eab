"""Scalars learned by classification into bins: HL-Gauss and two-hot targets, and the readout of a value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..terms import HLGauss
from ..wide_statistics import WideRowStats
from . import catalogue


def _generate(values: Tensor, low: float, high: float, sigma: float, **_: Any) -> dict[str, HLGauss]:
    return {"generated": HLGauss(values, low, high, sigma)}


@catalogue.row(
    formula="-sum_j q_j log p_j, q_j = (Phi((e_j+1 - v)/sigma) - Phi((e_j - v)/sigma)) / normaliser",
    gradient="p_j - q_j, q_j made in the kernel",
    source="Stop Regressing: Training Value Functions via Classification for Scalable Deep RL",
    statistics=("score_mean",),
    engine=_generate,
    published="differences of erf lose the tails and 0/0 outside the range; here erfc on the far side, values clamped",
)
def hl_gauss(
    stats: WideRowStats, *, values: Tensor, low: float = -10.0, high: float = 10.0, sigma: float = 0.3
) -> Tensor:
    """Cross entropy of V bins over [low, high] with a Gaussian around each value, one value a row.

    values [...]: clamped to [low, high]. sigma in the units of the values; 0.75 of a bin's width is the paper's choice.
    The [N, V] targets are never stored. `bin_readout` gives the value back.
    """
    return stats.teacher_nll


def two_hot_columns(values: Tensor, bins: int, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(ids [..., 2] of the bins whose centres enclose each value, weight [...] of the first).

    The centres are `bin_centres`; a value beyond the outermost centres belongs to the outermost bin alone.
    """
    if bins < 2 or not high > low:
        raise ValueError(f"needs at least 2 bins and low < high, got {bins}, {low}, {high}")
    width = (high - low) / bins
    place = ((values - low) / width - 0.5).clamp(0, bins - 1)
    first = place.floor().clamp(max=bins - 2)
    return torch.stack((first, first + 1), -1).to(torch.int64), 1 - (place - first)


def _two_hot_list(columns: Tensor, **_: Any) -> dict[str, Tensor]:
    return {"listed": columns}


@catalogue.row(
    formula="lse - (w z_k + (1 - w) z_k+1)",
    gradient="p_j - w [j = k] - (1 - w) [j = k+1]",
    source="Two-hot targets: Schrittwieser et al. 2020 (MuZero); Stop Regressing: Training Value Functions via "
    "Classification for Scalable Deep RL",
    engine=_two_hot_list,
)
def two_hot(stats: WideRowStats, *, columns: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy with the two bins around a value; `two_hot_columns` gives columns [..., 2] and weight [...]."""
    logp = stats.listed_logp
    w = weight.to(logp.dtype)

    def share(part: Tensor, k: int) -> Tensor:
        return torch.where(part == 0, 0.0, part * torch.where(part == 0, 0.0, logp[..., k]))

    return -share(w, 0) - share(1 - w, 1)


def bin_centres(bins: int, low: float, high: float, *, like: Tensor) -> Tensor:
    """[bins]: the centres of equal bins over [low, high], in like's dtype and on its device."""
    width = (high - low) / bins
    return low + width * (torch.arange(bins, dtype=like.dtype, device=like.device) + 0.5)


@catalogue.row(
    formula="E_p[centre] = sum_j p_j c_j",
    gradient="p_j (c_j - E_p[c])",
    source="Stop Regressing: Training Value Functions via Classification for Scalable Deep RL",
    statistics=("teacher_mean",),
)
def bin_readout(stats: WideRowStats) -> Tensor:
    """The value that a row of bins stands for; pass teacher=bin_centres(...), which is one row for all."""
    return stats.teacher_mean
