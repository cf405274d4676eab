"""The row ops in plain PyTorch: what runs where no kernel does, and what kernels are tested against.

float64 stays float64, so that gradcheck works; everything else accumulates in float32. The contract (what every number
is, and the derivation of the gradient) is docs/design.md, "The row contract".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .contract import NUM_COEFS, Coef, Stat, Want
from .registry import kernel

INF = math.inf


def accumulator(x: Tensor) -> Tensor:
    """x in the dtype that statistics are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def scores(logits: Tensor, scale: float, softcap: float) -> Tensor:
    """z = softcap * tanh(scale * logits / softcap), or scale * logits."""
    z = accumulator(logits) * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def finite(m: Tensor) -> Tensor:
    """The reference point `ref` of a row: its max, or 0 where that is -inf (nothing there)."""
    return torch.where(m == -INF, 0.0, m)


def _log_sum(shifted: Tensor) -> Tensor:
    """log sum exp over the last dim of values <= 0 with -inf allowed; -inf, with zero gradient, for an empty row."""
    total = shifted.exp().sum(-1)
    some = total != 0
    return torch.where(some, torch.where(some, total, 1.0).log(), -INF)


def _targets(
    target: Tensor | None, n: int, v: int, ignore_index: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(column to index with, rows that have it, rows that are ignored); out of range is neither."""
    if target is None:
        no = torch.zeros(n, dtype=torch.bool, device=device)
        return torch.zeros(n, dtype=torch.int64, device=device), no, no
    ignored = target == ignore_index
    own = (target >= 0) & (target < v) & ~ignored
    return torch.where(own, target, 0), own, ignored


def statistics(
    logits: Tensor,
    target: Tensor | None,
    prob: Tensor | None,
    column_weight: Tensor | None,
    temperature: Tensor | None,
    ignore_index: int,
    want: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(stats [8, N], top [N], argmax [N]), differentiable, with `max` a constant as the contract has it.

    `top` is the largest score of the row; it and `argmax` are empty unless Want.ARGMAX.
    """
    n, v = logits.shape
    column, own, ignored = _targets(target, n, v, ignore_index, logits.device)
    z = torch.where(ignored[:, None], 0.0, scores(logits, scale, softcap))
    columns = torch.arange(v, device=z.device)
    is_target = (columns == column[:, None]) & own[:, None]
    rest = z.masked_fill(is_target, -INF)
    m = rest.detach().amax(-1) if v else z.new_full((n,), -INF)
    ref = finite(m)
    shifted = z - ref[:, None]
    rest_shifted = rest - ref[:, None]
    logsum = _log_sum(rest_shifted)
    zero = torch.zeros_like(m)
    weight = torch.ones_like(z[0]) if column_weight is None else column_weight.to(z.dtype)
    mass = zero
    if prob is not None:
        weighted = accumulator(prob) * weight
        picked, mass = (weighted * shifted).sum(-1), weighted.sum(-1)
    else:
        picked = torch.where(own, z.gather(1, column[:, None])[:, 0], -INF if target is None else math.nan)
    mean = total = squares = tempered = zero
    if want & Want.ENTROPY:
        p = torch.softmax(z, -1)
        mean = torch.where(z == -INF, 0.0, p * torch.where(z == -INF, 0.0, shifted)).sum(-1)
    if want & Want.SUM:
        total = (weight * shifted).sum(-1)
    if want & Want.SUMSQ:
        squares = (shifted * shifted).sum(-1)
    if want & Want.TEMPERED:
        tempered = _log_sum(rest_shifted / _temperature(temperature, z)[:, None])
    table = torch.stack([m, logsum, picked, mean, total, squares, tempered, mass])
    table = torch.where(ignored, 0.0, table)
    top, argmax = z.new_empty(0), torch.empty(0, dtype=torch.int64, device=z.device)
    if want & Want.ARGMAX:
        top, argmax = z.max(-1)
        argmax = torch.where(ignored, -1, argmax)
    return table, top, argmax


def _temperature(temperature: Tensor | None, z: Tensor) -> Tensor:
    if temperature is None:
        raise ValueError("Want.TEMPERED needs `temperature`, one number > 0 a row; got None")
    return temperature.to(z.dtype)


@kernel("row_stats", "reference")
def row_stats(
    logits: Tensor,
    target: Tensor | None,
    prob: Tensor | None,
    column_weight: Tensor | None,
    temperature: Tensor | None,
    ignore_index: int,
    want: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """stats [8, N] and argmax [N] (empty unless wanted)."""
    with torch.no_grad():
        table, _, argmax = statistics(
            logits, target, prob, column_weight, temperature, ignore_index, want, scale, softcap
        )
    return table, argmax


@kernel("row_stats_backward", "reference")
def row_stats_backward(
    coef: Tensor,
    stats: Tensor,
    argmax: Tensor,
    logits: Tensor,
    target: Tensor | None,
    prob: Tensor | None,
    column_weight: Tensor | None,
    temperature: Tensor | None,
    ignore_index: int,
    want: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """dlogits [N, V] from seven coefficients a row."""
    n, v = logits.shape
    column, own, ignored = _targets(target, n, v, ignore_index, logits.device)
    z = torch.where(ignored[:, None], 0.0, scores(logits, scale, softcap))
    c = coef.to(z.dtype)[:, :, None]
    is_target = (torch.arange(v, device=z.device) == column[:, None]) & own[:, None]
    shifted = z - finite(stats[Stat.MAX])[:, None]
    logsum = stats[Stat.LOGSUM][:, None]
    weight = torch.ones_like(z[0]) if column_weight is None else column_weight.to(z.dtype)
    absent = is_target | (logsum == -INF)
    pi = torch.where(absent, 0.0, (shifted - logsum).exp())
    factor = c[Coef.REST]
    if want & Want.ENTROPY:
        factor = factor + c[Coef.REST_Z] * shifted.clamp(min=-1e30)  # 0 * -inf would be NaN
    dz = torch.where(absent, 0.0, pi * factor)
    if want & Want.TEMPERED:
        warm = shifted / _temperature(temperature, z)[:, None] - stats[Stat.LOGSUM_T][:, None]
        dz = dz + torch.where(absent, 0.0, warm.exp() * c[Coef.REST_T])
    if want & Want.SUM:
        dz = dz + c[Coef.COLUMN] * weight
    if want & Want.SUMSQ:
        dz = dz + c[Coef.LINEAR] * shifted
    if prob is not None:
        dz = dz + c[Coef.OWN] * accumulator(prob) * weight
    else:
        dz = dz + torch.where(is_target, c[Coef.OWN], 0.0)
    if want & Want.ARGMAX:
        dz = dz.scatter_add(1, argmax.clamp(min=0)[:, None], c[Coef.ARG])
    if softcap:
        dz = dz * (1 - (z / softcap) ** 2)
    if target is not None:
        dz = torch.where(ignored[:, None], 0.0, torch.where((own | ignored)[:, None], dz, math.nan))
    return (dz * scale).to(logits.dtype)


def epilogue_coefficients(stats: Tensor, epilogue: Tensor, soft: bool) -> Tensor:
    """The coefficients [7, N] of the loss that `epilogue` [4, N] describes (docs/design.md, "kBoth")."""
    nll, lse_weight, lse_squared, sum_weight = epilogue.to(stats.dtype)
    m, logsum, picked, mass = stats[Stat.MAX], stats[Stat.LOGSUM], stats[Stat.TARGET], stats[Stat.MASS]
    coef = torch.zeros(NUM_COEFS, stats.shape[1], dtype=stats.dtype, device=stats.device)
    if soft:
        coef[Coef.REST] = nll * mass + lse_weight + 2 * lse_squared * (m + logsum)
        coef[Coef.OWN] = -nll
    else:
        d = torch.where(picked == INF, math.nan, (picked - finite(m)) - logsum)  # inf - inf, as in torch
        lse = torch.where(logsum == -INF, picked, finite(m) + logsum + torch.nn.functional.softplus(d))
        h = lse_weight + torch.where(lse_squared == 0, 0.0, 2 * lse_squared * lse)
        coef[Coef.REST] = (nll + h) * torch.sigmoid(-d)
        coef[Coef.OWN] = h - coef[Coef.REST]
    coef[Coef.COLUMN] = sum_weight
    return coef


@kernel("cross_entropy", "reference")
def cross_entropy(
    logits: Tensor,
    target: Tensor | None,
    prob: Tensor | None,
    column_weight: Tensor | None,
    epilogue: Tensor,
    ignore_index: int,
    want: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """stats, argmax, and dlogits of the loss that `epilogue` describes."""
    stats, argmax = row_stats(logits, target, prob, column_weight, None, ignore_index, want, scale, softcap)
    coef = epilogue_coefficients(stats, epilogue, prob is not None)
    dlogits = row_stats_backward(
        coef, stats, argmax, logits, target, prob, column_weight, None, ignore_index, want, scale, softcap
    )
    return stats, argmax, dlogits


@kernel("row_stats_backward_unless_one_", "reference")
def row_stats_backward_unless_one_(dlogits: Tensor, upstream: Tensor, *args: Any) -> None:
    """row_stats_backward(*args) into dlogits, unless upstream, one number, is 1: then it is there already."""
    dlogits.copy_(torch.where(upstream == 1, dlogits, row_stats_backward(*args)))


@kernel("scale_unless_one_", "reference")
def scale_unless_one_(x: Tensor, factor: Tensor) -> None:
    """x *= factor."""
    x.mul_(factor)
