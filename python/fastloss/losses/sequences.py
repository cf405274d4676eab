"""Losses of whole sequences: edit-invariant n-gram matching (EISL) and distillation across tokenizers (ALM)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..autograd import can_look
from ..engine import linear_row_stats
from ..reference import INF
from ..segments import segment_sum
from . import catalogue


def target_logp(input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None) -> Tensor:
    """log p of every target token at every position, [B, T, T'], from features [B, T, D]; no [B, T, V] is made.

    target [B, T']. The log-sum-exp of the vocabulary streams, and only the scores of the T' targets are computed. Float32
    (float64 for float64 input). Raises ValueError for shapes, IndexError (CPU) for an id that is no class.
    """
    if input.dim() != 3 or target.dim() != 2 or len(input) != len(target):
        raise ValueError(
            f"takes input [B, T, D] and target [B, T'], got {tuple(input.shape)} and {tuple(target.shape)}"
        )
    vocab = linear_weight.shape[0]
    outside = (target < 0) | (target >= vocab)
    if can_look(target) and outside.any():
        raise IndexError(f"target {int(target[outside][0])} is out of bounds: classes are 0..{vocab - 1}")
    lse = linear_row_stats(input, linear_weight, linear_bias=linear_bias).lse
    # scores that were rounded otherwise than those of the log-sum-exp could be above it
    with torch.autocast(input.device.type, enabled=False):
        scores = torch.bmm(input, linear_weight[target].transpose(1, 2)).to(lse.dtype)
    if linear_bias is not None:
        scores = scores + linear_bias[target][:, None, :].to(lse.dtype)
    return scores - lse[..., None]


@catalogue.entry(
    formula="L_n = -mean_b sum_i sum_a G[a, i] c[a, i], c[a, i] = (1/n) sum_{k < n} log p_{a+k}(y_{i+k}), G = softmax_a(c)",
    gradient="-G (1 + c - sum_a G c) / n on log p of each listed token; minus its row sum on p",
    source="Don't Take It Literally: An Edit-Invariant Sequence Loss for Text Generation",
    published="random Gumbel noise inside the loss, .cuda() in the code, gradient cut at log p < -20; all optional here",
)
def edit_invariant(
    logp: Tensor, *, n: int | Sequence[int] = (1, 2), gumbel: bool = False, floor: float | None = None,
    input_mask: Tensor | None = None, target_mask: Tensor | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """EISL of logp [B, T, T'] (`target_logp`): every target n-gram may be matched at any position; one value a sequence.

    n: lengths of the n-grams, averaged; 0 stands for T' and -1 for T' - 1. gumbel adds the published noise to the
    weights. floor: lower bound of log p (published: -20). Masks [B, T] and [B, T'] are True where there is a token.

    In float32 at least. Raises ValueError for other shapes and for an n-gram that does not fit.
    """
    lengths = (n,) if isinstance(n, int) else tuple(n)
    if not lengths or logp.dim() != 3:
        raise ValueError(f"takes logp [B, T, T'] and at least one n, got {tuple(logp.shape)} and {lengths}")
    b, t, s = logp.shape
    rows, columns = _there("input_mask", input_mask, logp, (b, t)), _there("target_mask", target_mask, logp, (b, s))
    # what is masked is never read: a NaN there would reach other entries through the softmax of an n-gram's score
    logp = torch.where(
        rows[:, :, None] & columns[:, None], logp.to(torch.promote_types(logp.dtype, torch.float32)), 0.0
    )
    if floor is not None:
        logp = logp.clamp(min=floor)
    total = logp.new_zeros(b)
    for asked in lengths:
        size = asked if asked > 0 else s + asked
        if not 0 < size <= min(t, s):
            raise ValueError(f"an n-gram of length {size} does not fit into {t} positions and {s} targets")
        total = total + _matches(logp, rows, columns, size, gumbel, generator)
    return total / len(lengths)


def _there(name: str, mask: Tensor | None, logp: Tensor, shape: tuple[int, int]) -> Tensor:
    """`mask` as bool of `shape`, True everywhere without one."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=logp.device)
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(mask.shape)}")
    return mask != 0


def _matches(
    logp: Tensor, rows: Tensor, columns: Tensor, n: int, gumbel: bool, generator: torch.Generator | None
) -> Tensor:
    t, s = logp.shape[1] - n + 1, logp.shape[2] - n + 1
    score = sum((logp[:, k : k + t, k : k + s] for k in range(1, n)), logp[:, :t, :s]) / n
    there = torch.stack([rows[:, k : k + t] for k in range(n)]).all(0)[:, :, None]
    wanted = torch.stack([columns[:, k : k + s] for k in range(n)]).all(0)
    weight = score
    if gumbel:
        noise = torch.rand(score.shape, generator=generator, dtype=torch.float64).to(score.device, score.dtype)
        weight = score - (-noise.clamp(1e-12, 1 - 1e-7).log()).log()
    weight = torch.softmax(weight.masked_fill(~there, -1e30), 1)
    chosen = torch.where(there & (score > -INF), score, 0.0)
    matched = -(weight * chosen).sum(1)
    return torch.where(wanted, matched, 0.0).sum(1)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x), x < 0."""
    near = x > -math.log(2.0)
    return torch.where(
        near, (-torch.expm1(torch.where(near, x, -1.0))).log(), torch.log1p(-torch.where(near, -1.0, x).exp())
    )


@catalogue.entry(
    formula="-(e^a b + (1 - e^a) log(1 - e^b)), a = t/tau - eps, b = s/tau - eps; s, t log-probabilities of a chunk",
    gradient="-(1/tau) (e^a - (1 - e^a) e^(b - log(1 - e^b))) on every token of the chunk",
    source="Cross-Tokenizer Distillation via Approximate Likelihood Matching",
)
def approximate_likelihood(student: Tensor, teacher: Tensor, *, tau: float = 100.0, eps: float = 1e-6) -> Tensor:
    """ALM, one value a chunk: binary cross entropy of the two models' likelihoods of the same text [chunks].

    student, teacher: sums of token log-probabilities over chunks that both tokenizers delimit; to each may be added the
    log-probability that the next token begins with a space (`WideRowStats.subset_logp` with subset=the space tokens).
    The teacher is detached. Both are capped at 0. Raises ValueError for shapes that differ and tau <= 0.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"one chunk of the teacher a chunk, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    a = teacher.detach().clamp(max=0) / tau - eps
    b = student.clamp(max=0) / tau - eps
    return -(a.exp() * b - torch.expm1(a) * _log1mexp(b))


def chunk_logp(logp: Tensor, chunks: Tensor, count: int) -> Tensor:
    """Sums of token log-probabilities [N] over chunks [N] (ids 0..count-1; negative: in none): [count]."""
    return segment_sum(logp, chunks, count)
