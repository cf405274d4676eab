"""Direct coverage optimisation: the loss of the best of n samples, for a token, a whole answer, or each step of one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..statistics import RowStats
from . import catalogue
from .margin_form import check_above, counted, log1mexp

PAPER = "Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning"
_F = "F = n (1 - P)^(n - 1) P / (1 - (1 - P)^n)"
_SERIES_BELOW = math.log(1e-8)  # of n P: the next term of the series is (n P)^2 / 24, below the rounding of float64


def _loss(logp: Tensor, log1mp: Tensor, n: float | Tensor) -> Tensor:
    """-log(1 - (1 - P)^n) from log P and log(1 - P).

    Where n P is tiny it is (n - 1) P / 2 - log(n P): P itself may underflow there, but log P does not.
    """
    n = n.to(logp.dtype) if isinstance(n, Tensor) else n
    log_n = n.log() if isinstance(n, Tensor) else math.log(n)
    log_np = logp + log_n
    tiny = log_np < _SERIES_BELOW
    all_fail = n * torch.where(tiny, -1.0, log1mp)
    rows = torch.where(tiny, (n - 1) / 2 * logp.exp() - log_np, -log1mexp(all_fail))
    return torch.where(n == 1, -logp, rows) if isinstance(n, Tensor) else rows


@catalogue.row(
    formula="-log(1 - (1 - p_y)^n)",
    gradient=f"phi'(d) (1[j=y] - pi_j), phi' = -F sigma(-d), {_F} at P = p_y",
    source=PAPER,
    published="multiplies cross entropy by a detached F: the gradient is right, the value that is logged is not; its series "
    "for n P < 0.1 is off by 1.3e-4 and needs float64. Here the value itself, exact in float32",
)
def pass_at_n(stats: RowStats, *, n: float | Tensor = 16) -> Tensor:
    """-log(1 - (1 - p_y)^n), one value a row, 0 on ignored rows: one of n tries shall say the target.

    n: a number > 0, or a tensor with one a row. n = 1 is cross entropy; with a large n a row that is likely enough moves
    no more. Raises ValueError for n <= 0.

    "Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning", Chen et
    al. (2025).
    """
    check_above(0, n=n)
    if not isinstance(n, Tensor) and n == 1:
        return -stats.logp
    d = stats.margin
    return counted(stats, _loss(torch.nn.functional.logsigmoid(d), torch.nn.functional.logsigmoid(-d), n))


@catalogue.entry(
    formula="-log(1 - (1 - P)^n), P = e^logp", gradient=f"-F for logp, {_F}", source=PAPER,
    published="see pass_at_n; one of its two functions divides by the token count",
)  # fmt: skip
def pass_at_n_sequence(logp: Tensor, *, n: float | Tensor = 16) -> Tensor:
    """-log(1 - (1 - P)^n) of whole answers; logp = log P, the sum of `RowStats.logp` over the tokens of each.

    logp: any shape, <= 0. n: a number > 0, or a tensor of that shape. Raises ValueError for n <= 0.
    """
    check_above(0, n=n)
    if not isinstance(n, Tensor) and n == 1:
        return -logp
    certain = logp >= 0
    some = torch.where(certain, -1.0, logp)
    at_one = torch.where(n == 1, -logp, 0.0) if isinstance(n, Tensor) else torch.zeros_like(logp)
    return torch.where(certain, at_one, _loss(some, log1mexp(some), n))


@catalogue.entry(
    formula="-log(1 - (1 - P_s)^n_s), log P_s = sum of the token log-probabilities of step s",
    gradient=f"-F_s for every token of step s, {_F}",
    source=PAPER,
)
def pass_at_n_step(logp: Tensor, step: Tensor, *, n: float | Tensor = 16, steps: int | None = None) -> Tensor:
    """`pass_at_n_sequence` of each step (tactic, sentence) of an answer: [steps].

    logp: log-probabilities of tokens, any shape. step: the step that each token belongs to (int64, the same shape); a
    negative number leaves the token out. n: a number, or one a step. steps: how many there are; without it 1 + the
    largest in `step`, which on a GPU waits for the device. A step without tokens has the loss 0.
    Raises ValueError for shapes that differ and n <= 0.
    """
    if step.shape != logp.shape:
        raise ValueError(f"step must have the shape of logp, {tuple(logp.shape)}, got {tuple(step.shape)}")
    step, logp = step.reshape(-1), logp.reshape(-1)
    if steps is None:
        steps = max(0, int(step.max()) + 1) if step.numel() else 0
    left_in = step >= 0
    kept = torch.where(left_in, logp, 0.0)
    sums = torch.zeros(steps, dtype=logp.dtype, device=logp.device)
    if steps:
        sums = sums.index_add(0, torch.where(left_in, step, 0), kept)
    return pass_at_n_sequence(sums, n=n)
