"""Predictions in a metric space of labels: the label nearest to a distribution over the labels that have an output."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked import chunk_rows, logits_in_chunks
from .engine import check_head, check_rows, extra_bytes
from .predict import scaling
from .reference import INF, accumulator, scores

#: Numbers of a block of squared distances, and labels that it has at least: a GEMM of fewer is slow.
_BLOCK, _LABELS = 1 << 20, 64


def _nearest(p: Tensor, distances: Tensor, squared: bool) -> Tensor:
    """argmin_y sum_j p_j d(y, j)^2 of each row of p [n, V], labels in blocks; -1 where no sum is finite."""
    with torch.autocast(p.device.type, enabled=False):  # which would round probabilities and distances to 16 bits
        return _nearest_in_blocks(p, distances, squared)


def _nearest_in_blocks(p: Tensor, distances: Tensor, squared: bool) -> Tensor:
    (n, v), labels = p.shape, distances.shape[0]
    best, index = p.new_full((n,), INF), torch.full((n,), -1, dtype=torch.int64, device=p.device)
    step = max(_LABELS, _BLOCK // max(v, n, 1))
    for first in range(0, labels, step):
        d = distances[first : first + step].to(p.dtype)
        sums = torch.mm(p, (d if squared else d * d).T)
        value, at = torch.where(sums.isnan(), INF, sums).min(-1)  # 0 * inf: a label that is out of reach
        closer = value < best
        best, index = torch.where(closer, value, best), torch.where(closer, at + first, index)
    return index


def _check_distances(distances: Tensor, vocab: int, device: torch.device) -> None:
    if distances.dim() != 2 or distances.shape[1] != vocab or not distances.shape[0]:
        raise ValueError(f"distances must have shape [M, {vocab}] with M > 0, got {tuple(distances.shape)}")
    if distances.is_complex() or distances.dtype == torch.bool:
        raise TypeError(f"distances must be real numbers, got {distances.dtype}")
    if distances.device != device:
        raise ValueError(f"distances are on {distances.device}, the scores on {device}")


@torch.no_grad()
def frechet_mean(
    logits: Tensor, distances: Tensor, *, probabilities: bool = False, squared: bool = False, temperature: float = 1.0
) -> Tensor:
    """argmin over all labels y of sum_j p_j d(y, j)^2, with p = softmax(logits / temperature): int64 [...].

    The Fréchet mean of the predicted distribution: a label that has no output of its own can be predicted, as long as its
    distances to those that have one are known (the Loki rule of Roberts et al., "Geometry-Aware Adaptation for Pretrained
    Models", 2023). With all distances between different labels equal it is the argmax.

    logits: [..., V], float; probabilities=True says that they are p already. distances: [M, V], row y the distances of label
    y to the V labels with an output, or their squares with squared=True; M may be larger than V. p and the sums are float32
    (float64 for float64 logits); of p, of the sums and of the squares only blocks are stored. A
    distance may be infinite, and that label is not predicted. A row with no finite sum (NaN) has -1.
    """
    if logits.dim() < 1 or not logits.shape[-1]:
        raise ValueError(f"logits must have a last dimension of at least one label, got shape {tuple(logits.shape)}")
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    check_rows(logits, vocab, None, None)
    _check_distances(distances, vocab, logits.device)
    scale, _ = scaling(1.0, None, temperature)
    flat = logits.reshape(shape.numel(), vocab)
    index = torch.empty(len(flat), dtype=torch.int64, device=logits.device)
    rows = chunk_rows(flat, distances.new_empty(vocab, 0), 0)
    for first in range(0, len(flat), rows):
        z = accumulator(flat[first : first + rows])
        index[first : first + rows] = _nearest(z if probabilities else torch.softmax(z * scale, -1), distances, squared)
    return index.reshape(shape)


@torch.no_grad()
def linear_frechet_mean(
    input: Tensor,
    linear_weight: Tensor,
    distances: Tensor,
    *,
    linear_bias: Tensor | None = None,
    squared: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_extra_bytes: int | None = None,
) -> Tensor:
    """`frechet_mean` of logits = softcap(logit_scale * (input linear_weightᵀ + linear_bias)), a chunk of rows at a time.

    input: [..., D]. linear_weight: [V, D]. linear_bias: [V]. max_extra_bytes bounds the logits held at a time, which are
    held once more as probabilities.
    """
    check_head(input, linear_weight, linear_bias)
    vocab, shape = linear_weight.shape[0], input.shape[:-1]
    check_rows(input, vocab, None, None)
    _check_distances(distances, vocab, input.device)
    scale, cap = scaling(logit_scale, softcap, temperature)
    x = input.reshape(shape.numel(), linear_weight.shape[1])
    index = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for part, z in logits_in_chunks(x, linear_weight, linear_bias, extra_bytes(max_extra_bytes)):
        index[part] = _nearest(torch.softmax(scores(z, scale, cap), -1), distances, squared)
    return index.reshape(shape)
