"""Predictions of a head whose logits are never stored: the largest, the k largest, and tokens drawn from the softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunked import chunk_rows, logits_in_chunks
from .contract import Stat, Want
from .engine import check_head, check_rows, extra_bytes
from .reference import INF, accumulator, finite, scores

OPS = torch.ops.fastloss


class Sampled(NamedTuple):
    """A token of each row and its log-probability under the distribution that it was drawn from.

    index is -1 and logp NaN where there is no distribution: all scores of the row -inf, or one of them NaN or +inf.
    """

    index: Tensor  # type: ignore[assignment]  # not tuple.index
    logp: Tensor


class TopK(NamedTuple):
    """The k largest of each row, in descending order, and their columns."""

    values: Tensor
    indices: Tensor


def noise_seed(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """One int64 on `device`: the seed given, or one drawn from the generator (torch's default one of the device)."""
    if seed is not None and generator is not None:
        raise ValueError("takes a seed or a generator, not both")
    if seed is None:
        at = device if generator is None else generator.device
        return torch.empty((), dtype=torch.int64, device=at).random_(generator=generator).to(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"a seed tensor holds one torch.int64, got {seed.numel()} {seed.dtype}")
        return seed.reshape(()).to(device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=device)


def _positive(name: str, value: float) -> float:
    if not 0 < value < INF:
        raise ValueError(f"{name} must be > 0 and finite, got {value}")
    return float(value)


def scaling(logit_scale: float, softcap: float | None, temperature: float = 1.0) -> tuple[float, float]:
    """(scale, softcap) of z / temperature: both shrink by it, since the cap stands outside the tanh."""
    t = _positive("temperature", temperature)
    cap = 0.0 if softcap is None else _positive("softcap", softcap)
    return _positive("logit_scale", logit_scale) / t, cap / t


def _count(k: int, vocab: int, name: str) -> int:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{name} must be an int, got {type(k).__name__}")
    if not 1 <= k <= vocab:
        raise ValueError(f"{name} must be in 1..{vocab}, the number of columns, got {k}")
    return k


def _row_streams(streams: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    if streams is None:
        return torch.arange(shape.numel(), device=device)
    if streams.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"streams must hold integers, got {streams.dtype}")
    if streams.shape != shape:
        raise ValueError(f"streams must have shape {tuple(shape)}, one a row; got {tuple(streams.shape)}")
    if streams.device != device:
        raise ValueError(f"streams are on {streams.device}, the scores on {device}")
    return streams.to(torch.int64).reshape(-1)


def _head(
    input: Tensor, weight: Tensor, bias: Tensor | None, limit: int | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None, int]]:
    """(input as rows, the arguments of logits_in_chunks), checked."""
    check_head(input, weight, bias)
    check_rows(input, weight.shape[0], None, None)
    if not weight.shape[0]:
        raise ValueError("linear_weight must have at least one row, a class; got 0")
    x = input.reshape(input.shape[:-1].numel(), weight.shape[1])
    return x, (x, weight, bias, extra_bytes(limit))


def _only_top(logits: Tensor, k: int, out: Tensor | None = None) -> Tensor:
    """The logits with all but the k largest of each row -inf; `out` may be the logits themselves."""
    values, columns = torch.topk(logits, k, sorted=False)
    out = torch.empty_like(logits) if out is None else out
    return out.fill_(-INF).scatter_(1, columns, values)


@torch.no_grad()
def row_sample(
    logits: Tensor,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    streams: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Sampled:
    """Draw a column of each row from softmax(z / temperature), z = softcap(logit_scale * logits), and its log-probability.

    index = argmax_j (z_j / temperature + G_j) with G_j standard Gumbel numbers (the Gumbel-max trick; Maddison et al.,
    "A* Sampling", 2014), in one pass over the logits and without any memory of their size (top_k: that of a chunk of
    rows). The noise depends on the seed, the row's stream and the column alone: every backend, number of threads and
    layout of the batch draws the same token, but for scores that float32 cannot tell apart.

    logits: [..., V], float32, float16, bfloat16 or float64. A logit of -inf is never drawn, whatever the softcap. seed: 64
    bits, an int or an int64 tensor of one number (on a GPU, one that a CUDA graph may change); without it one is drawn
    from `generator`, or from torch's default generator of the device, which torch.manual_seed sets. streams: integers
    [...], whose noise each row takes; by default its number in the batch. top_k: only the k largest are drawn from (among
    equal ones those that torch.topk takes), with the same noise. logp is of the distribution that is drawn from: with
    temperature, and over the top k.

    Returns Sampled(index int64 [...], logp float32 [...], float64 for float64 logits). Raises ValueError and TypeError for
    arguments out of range, of a wrong shape or dtype. Nothing is differentiable.
    """
    if logits.dim() < 1 or not logits.shape[-1]:
        raise ValueError(f"logits must have a last dimension of at least one class, got shape {tuple(logits.shape)}")
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    check_rows(logits, vocab, None, None)
    factors = scaling(logit_scale, softcap, temperature)
    flat, stream = logits.reshape(shape.numel(), vocab), _row_streams(streams, shape, logits.device)
    k = None if top_k is None else _count(top_k, vocab, "top_k")
    noise = noise_seed(seed, generator, logits.device)
    if k is None:
        index, logp = OPS.row_sample(flat, noise, stream, *factors)
        return Sampled(index.reshape(shape), logp.reshape(shape))
    rows = chunk_rows(flat, flat.new_empty(vocab, 0), 0)  # only so many rows are copied at a time
    parts = [
        OPS.row_sample(_only_top(z, k), noise, s, *factors)
        for z, s in zip(flat.split(rows), stream.split(rows), strict=True)
    ]
    index, logp = (torch.cat(t) for t in zip(*parts, strict=True))
    return Sampled(index.reshape(shape), logp.reshape(shape))


@torch.no_grad()
def linear_sample(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    streams: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_extra_bytes: int | None = None,
) -> Sampled:
    """`row_sample` of logits = input linear_weightᵀ + linear_bias, of which only a chunk of rows is held at a time.

    input: [..., D]. linear_weight: [V, D]. linear_bias: [V]; -inf bars a class. The size of the chunks, which
    max_extra_bytes bounds, changes the draw only as far as it changes the logits that the library's GEMM makes.
    """
    x, head = _head(input, linear_weight, linear_bias, max_extra_bytes)
    shape, factors = input.shape[:-1], scaling(logit_scale, softcap, temperature)
    k = None if top_k is None else _count(top_k, linear_weight.shape[0], "top_k")
    stream, noise = _row_streams(streams, shape, x.device), noise_seed(seed, generator, x.device)
    index = torch.empty(len(x), dtype=torch.int64, device=x.device)
    logp = torch.empty(len(x), dtype=accumulator(x[:0]).dtype, device=x.device)
    for part, z in logits_in_chunks(*head):
        if k is not None:
            _only_top(z, k, out=z)
        index[part], logp[part] = OPS.row_sample(z, noise, stream[part], *factors)
    return Sampled(index.reshape(shape), logp.reshape(shape))


@torch.no_grad()
def linear_argmax(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    max_extra_bytes: int | None = None,
) -> Tensor:
    """int64 [...]: the lowest column with the largest logit input linear_weightᵀ + linear_bias; the logits are not stored.

    input: [..., D]. linear_weight: [V, D]. linear_bias: [V]. A positive scale, a temperature or a softcap would not change
    it. A NaN is larger than everything, as in torch.argmax.
    """
    x, (_, w, bias, limit) = _head(input, linear_weight, linear_bias, max_extra_bytes)
    _, column = OPS.linear_row_stats(x, w, bias, want=int(Want.ARGMAX), max_extra_bytes=limit)
    return column.reshape(input.shape[:-1])


@torch.no_grad()
def linear_topk(
    input: Tensor,
    linear_weight: Tensor,
    k: int,
    *,
    linear_bias: Tensor | None = None,
    log_probs: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_extra_bytes: int | None = None,
) -> TopK:
    """The k largest z = softcap(logit_scale * (input linear_weightᵀ + linear_bias)) of each row, largest first.

    log_probs=True returns log softmax(z) of them instead, over all classes. Only a chunk of rows of logits is held at a
    time, which max_extra_bytes bounds (a softcap together with log_probs holds it once more in float32). A logit of -inf
    stays one under a softcap, and among equal values torch.topk chooses.

    input: [..., D]. linear_weight: [V, D]. linear_bias: [V]. Returns TopK(values [..., k] float32 (float64 for float64
    input), indices int64 [..., k]). Raises ValueError for k outside 1..V.
    """
    x, head = _head(input, linear_weight, linear_bias, max_extra_bytes)
    scale, cap = scaling(logit_scale, softcap)
    k = _count(k, linear_weight.shape[0], "k")
    values = torch.empty(len(x), k, dtype=accumulator(x[:0]).dtype, device=x.device)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for part, logits in logits_in_chunks(*head):
        best, indices[part] = torch.topk(logits, k)  # a positive scale and a cap do not change the order
        values[part] = _log_probs(best, logits, scale, cap) if log_probs else _bent(best, scale, cap)
    shape = (*input.shape[:-1], k)
    return TopK(values.reshape(shape), indices.reshape(shape))


def _bent(logits: Tensor, scale: float, softcap: float) -> Tensor:
    return torch.where(logits == -INF, -INF, scores(logits, scale, softcap))


def _log_probs(best: Tensor, logits: Tensor, scale: float, softcap: float) -> Tensor:
    """log softmax(z) of the columns whose logits are `best`."""
    if softcap:  # row_stats would count a logit of -inf as one of -softcap
        best, logits, scale = _bent(best, scale, softcap), _bent(logits, scale, softcap), 1.0
    stats, _ = OPS.row_stats(logits, scale=scale)
    return (_bent(best, scale, 0.0) - finite(stats[Stat.MAX])[:, None]) - stats[Stat.LOGSUM][:, None]
