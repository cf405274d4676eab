"""Weights pulled in before binarisation, so that none stays out of reach of its sign (ReCU)."""

from __future__ import annotations

import math

from torch import Tensor

from .ops import wide


def recu_tau(progress: float, start: float = 0.85, end: float = 0.99) -> float:
    """ReCU's tau at a share `progress` in [0, 1] of the training: A e^progress + B, from `start` to `end`.

    Source: "BiBench: Benchmarking and Analyzing Network Binarization" (its ReCU operator).
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    rise = (end - start) / (math.e - 1)
    return rise * math.exp(progress) + start - rise


def recu_weight(weight: Tensor, tau: float) -> Tensor:
    """The weight that ReCU binarises (by `binarize` with the identity surrogate): standardised, and clamped.

        w = (W - mean) / (std / (2 sqrt 2)),   each row its own mean and std (of R - 1);   Q = -mean|w| log(2 - 2 tau)
        w' = clamp(w, -Q, Q),   Q of a row, without a gradient

    Q is the tau-quantile of a Laplace distribution with that mean |w|. A row of equal numbers has no std: NaN. As a module:
    `layers.ReCU`.

    Args:
        weight: [out, ...], floating, at least two numbers a row. tau: in [0.5, 1), `recu_tau`.

    Raises ValueError. Source: "BiBench: Benchmarking and Analyzing Network Binarization".
    """
    if not weight.is_floating_point() or weight.dim() < 2 or weight[:1].numel() < 2:
        raise ValueError(
            f"weight must be floating [out, ...] with two numbers a row, got {weight.dtype} {list(weight.shape)}"
        )
    check_tau(tau)
    rows = weight.flatten(1).to(wide(weight))
    w = (rows - rows.mean(1, keepdim=True)) * (2 * math.sqrt(2)) / rows.std(1, keepdim=True)
    limit = (-math.log(2 - 2 * tau) * w.detach().abs().mean(1, keepdim=True)).clamp(min=0)
    return w.clamp(-limit, limit).to(weight.dtype).reshape(weight.shape)


def check_tau(tau: float) -> None:
    """ValueError unless tau is a share that ReCU can keep."""
    if not 0.5 <= tau < 1:
        raise ValueError(f"tau must be in [0.5, 1), got {tau}")
