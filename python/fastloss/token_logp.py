"""Log-probabilities of given tokens, under a linear head whose logits are never stored: what preference and RL losses take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .engine import linear_row_stats, row_stats, shifted
from .statistics import RowStats


def token_targets(
    target: Tensor, *, ignore_index: int = -100, shift: bool = False, sequence_ids: Tensor | None = None
) -> Tensor:
    """The token whose log-probability stands at each position: `target`, or with shift the next one.

    sequence_ids (packed rows; same shape): the last token of a sequence is not followed by the first of the next.
    """
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"target must hold token ids (an integer dtype), got {target.dtype}")
    if sequence_ids is not None and sequence_ids.shape != target.shape:
        raise ValueError(
            f"sequence_ids must have the shape of target, {tuple(target.shape)}, got {tuple(sequence_ids.shape)}"
        )
    if sequence_ids is not None and (sequence_ids.is_floating_point() or sequence_ids.dtype == torch.bool):
        raise TypeError(f"sequence_ids must hold integers, got {sequence_ids.dtype}")
    if not shift:
        return target
    if not target.dim():
        raise ValueError("shift needs a last dimension of positions, got a target of shape ()")
    following = shifted(target.to(torch.int64), ignore_index)
    if sequence_ids is None:
        return following
    crosses = shifted(sequence_ids.to(torch.int64), -1) != sequence_ids
    return torch.where(crosses, ignore_index, following)


def token_mask(
    target: Tensor, *, ignore_index: int = -100, shift: bool = False, sequence_ids: Tensor | None = None
) -> Tensor:
    """True where `token_logp` with these arguments gives a log-probability, False where it gives 0."""
    return token_targets(target, ignore_index=ignore_index, shift=shift, sequence_ids=sequence_ids) != ignore_index


def token_logp(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    sequence_ids: Tensor | None = None,
    entropy: bool = False,
    max_extra_bytes: int | None = None,
) -> Any:
    """log softmax(z / temperature)[target], z = softcap(logit_scale (input linear_weightᵀ + linear_bias)).

    input: [..., D]. linear_weight: [V, D]. linear_bias: [V]. target: token ids [...], `ignore_index` where there is
    none. Returns [...], float32 (float64 for float64 input), 0 on ignored tokens; with entropy=True also the entropy of
    softmax(z / temperature), [...]. Both are differentiable (any loss of them: the logits are made again
    in the backward). Under torch.no_grad() (old and reference policies, whose result may be kept and given to a loss any number
    of times) nothing but the result is kept.

    temperature: what the tokens were sampled with; it divides the logits after the softcap, as samplers do.
    shift: position t has the log-probability of token t + 1; the last position of a row has none. sequence_ids: which
    sequence each token of a packed row is of, so that shift does not look across their border.
    max_extra_bytes bounds the logits held at a time.

    The margin form: log p = -softplus(-d), d = z_y - LSE of the other columns, which has no cancellation at p -> 1.
    Raises ValueError and TypeError for wrong shapes, dtypes and numbers; IndexError (CPU) for an id out of range.
    """
    scale, cap = _tempered(temperature, logit_scale, softcap)
    tokens = token_targets(target, ignore_index=ignore_index, shift=shift, sequence_ids=sequence_ids)
    stats = linear_row_stats(
        input, linear_weight, tokens, linear_bias=linear_bias, stats=("entropy",) if entropy else (),
        ignore_index=ignore_index, logit_scale=scale, softcap=cap, max_extra_bytes=max_extra_bytes,
    )  # fmt: skip
    return _result(stats, entropy)


def token_logp_of_logits(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    sequence_ids: Tensor | None = None,
    entropy: bool = False,
) -> Any:
    """`token_logp` of logits [..., V] that exist: one read of them, and no copy of their softmax."""
    scale, cap = _tempered(temperature, logit_scale, softcap)
    tokens = token_targets(target, ignore_index=ignore_index, shift=shift, sequence_ids=sequence_ids)
    stats = row_stats(
        logits, tokens, stats=("entropy",) if entropy else (), ignore_index=ignore_index, logit_scale=scale, softcap=cap
    )
    return _result(stats, entropy)


def _tempered(temperature: float, scale: float, softcap: float | None) -> tuple[float, float | None]:
    """c tanh(s l / c) / T = (c / T) tanh((s / T) l / (c / T)): a temperature is another scale and another cap."""
    if isinstance(temperature, Tensor) or not temperature > 0:
        raise ValueError(f"temperature must be a number > 0, got {temperature!r}")
    return scale / temperature, None if softcap is None else softcap / temperature


def _result(stats: RowStats, entropy: bool) -> Any:
    if not entropy:
        return stats.logp
    return stats.logp, torch.where(stats.valid, stats.entropy, 0.0)
