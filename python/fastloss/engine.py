"""The rows engine as users call it: statistics of given logits or of a linear head, and any loss made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from . import autograd
from .autograd import Options
from .contract import Want
from .fused import pack
from .statistics import RowStats

_WANT = {
    "entropy": Want.ENTROPY,
    "sum": Want.SUM,
    "sumsq": Want.SUM | Want.SUMSQ,
    "tempered_lse": Want.TEMPERED,
    "argmax": Want.ARGMAX,
}


def want_flags(names: Iterable[str]) -> Want:
    """The flags of the statistics named."""
    want = Want.NOTHING
    for name in (names,) if isinstance(names, str) else names:
        if name not in _WANT:
            raise ValueError(f"unknown statistic {name!r}: one of {', '.join(_WANT)}")
        want |= _WANT[name]
    return want


def check_targets(
    target: Tensor | None, rows: int, vocab: int, shape: torch.Size
) -> tuple[Tensor | None, Tensor | None]:
    """(class ids [N] or None, probabilities [N, V] or None) from what the user gave as target."""
    if target is None:
        return None, None
    if target.is_floating_point():
        if target.shape != (*shape, vocab):
            raise ValueError(f"target probabilities must have shape {(*shape, vocab)}, got {tuple(target.shape)}")
        return None, target.reshape(rows, vocab)
    if target.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(
            f"target must hold class ids (an integer dtype) or probabilities (floating), got {target.dtype}"
        )
    if target.shape != shape:
        raise ValueError(f"target ids must have shape {tuple(shape)}, got {tuple(target.shape)}")
    return target.reshape(rows).to(torch.int64), None


def options(ignore_index: int, want: int, scale: float, softcap: float | None) -> Options:
    """Checked options of a row op."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    return Options(int(ignore_index), int(want), float(scale), float(softcap or 0.0))


def _temperature(t: float | Tensor | None, want: Want, rows: int, shape: torch.Size, like: Tensor) -> Tensor | None:
    if t is None:
        if want & Want.TEMPERED:
            raise ValueError('the statistic "tempered_lse" needs `temperature`: a number, or a tensor with one a row')
        return None
    acc = torch.promote_types(like.dtype, torch.float32)
    if not isinstance(t, Tensor):
        if not t > 0:
            raise ValueError(f"temperature must be > 0, got {t}")
        return torch.full((rows,), float(t), dtype=acc, device=like.device)
    if t.requires_grad:
        raise ValueError("the gradient with respect to `temperature` is not computed: pass temperature.detach()")
    if t.numel() != 1 and t.shape != shape:
        raise ValueError(f"temperature must hold 1 number or have shape {tuple(shape)}, got {tuple(t.shape)}")
    return t.to(like.device, acc).reshape(-1).expand(rows).contiguous()


def row_stats(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    stats: Iterable[str] = (),
    column_weight: Tensor | None = None,
    temperature: float | Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> RowStats:
    """Differentiable statistics of every row of z = softcap(logit_scale * logits); softcap(z) = c tanh(z / c).

    logits: [..., V], float32, float16, bfloat16 or float64. target: class ids [...] (any integer dtype), probabilities
    [..., V] (then differentiable too), or None. stats: names of the statistics wanted besides the target logit and the
    LSE of the rest: "entropy", "sum", "sumsq", "tempered_lse" (LSE(z / temperature)), "argmax". column_weight [V]: the
    c_j of "sum" and of probabilities. temperature: a number > 0, or one a row [...].

    Raises ValueError and TypeError for wrong shapes, dtypes and names; IndexError (CPU) for a class id out of range.
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    rows = shape.numel()
    want = want_flags(stats)
    ids, prob = check_targets(target, rows, vocab, shape)
    warm = _temperature(temperature, want, rows, shape, logits)
    o = options(ignore_index, want, logit_scale, softcap)
    out = autograd.row_stats(logits.reshape(rows, vocab), ids, prob, column_weight, warm, o)
    return pack(*out, ids, prob is not None, vocab, o, column_weight, warm, shape)


def linear_row_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    stats: Iterable[str] = (),
    column_weight: Tensor | None = None,
    temperature: float | Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_extra_bytes: int | None = None,
    grad_weight: Tensor | None = None,
) -> RowStats:
    """`row_stats` of logits = input linear_weightᵀ + linear_bias, which are never stored; made again in the backward.

    input: [..., D]. linear_weight: [V, D]. linear_bias: [V]. max_extra_bytes bounds the logits held at a time.
    grad_weight: a float32 [V, D] buffer (Megatron's main_grad) that the backward adds dW to, exactly, instead of
    leaving it in linear_weight.grad.
    """
    check_head(input, linear_weight, linear_bias)
    if grad_weight is not None and (grad_weight.shape != linear_weight.shape or grad_weight.dtype != torch.float32):
        raise ValueError(
            f"grad_weight must be float32 {tuple(linear_weight.shape)}, got {grad_weight.dtype} {tuple(grad_weight.shape)}"
        )
    shape, vocab = input.shape[:-1], linear_weight.shape[0]
    rows = shape.numel()
    want = want_flags(stats)
    ids, prob = check_targets(target, rows, vocab, shape)
    warm = _temperature(temperature, want, rows, shape, input)
    o = options(ignore_index, want, logit_scale, softcap)
    x = input.reshape(rows, input.shape[-1])
    out = autograd.linear_row_stats(
        x, linear_weight, linear_bias, ids, prob, column_weight, warm, o, extra_bytes(max_extra_bytes), grad_weight
    )
    return pack(*out, ids, prob is not None, vocab, o, column_weight, warm, shape)


def extra_bytes(limit: int | None) -> int:
    """0 for no limit."""
    if limit is not None and limit <= 0:
        raise ValueError(f"max_extra_bytes must be > 0 or None, got {limit}")
    return int(limit or 0)


def check_head(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of a linear head."""
    if weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"input must be [..., D] and linear_weight [V, D], got {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"linear_bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if weight.dtype != input.dtype:
        raise RuntimeError(f"input and linear_weight must have one dtype, got {input.dtype} and {weight.dtype}")
    devices = {t.device for t in (input, weight, bias) if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def reduce_rows(rows: Tensor, stats: RowStats, reduction: str) -> Tensor:
    """Ignored rows count nothing: 0 under "none", left out of the sum and the count otherwise."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')
    if rows.shape != stats.shape:
        raise ValueError(f"a row loss returns one value a row, shape {tuple(stats.shape)}; got {tuple(rows.shape)}")
    if stats.target is not None:
        rows = torch.where(stats.valid, rows, 0.0)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / stats.valid.sum()


RowLoss = Callable[[RowStats], Tensor]


def row_loss(
    logits: Tensor, target: Tensor | None, loss: RowLoss, *, reduction: str = "mean", **stats_arguments: object
) -> Tensor:
    """loss(row_stats(logits, target, **stats_arguments)), reduced. `loss` maps RowStats to one value a row.

    >>> focal = lambda s: (1 - s.logp.exp()) ** 2 * -s.logp
    >>> fastloss.row_loss(logits, target, focal)  # doctest: +SKIP
    """
    s = row_stats(logits, target, **stats_arguments)  # type: ignore[arg-type]
    return reduce_rows(loss(s), s, reduction)


def linear_row_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    loss: RowLoss,
    *,
    reduction: str = "mean",
    **stats_arguments: object,
) -> Tensor:
    """loss(linear_row_stats(input, linear_weight, target, **stats_arguments)), reduced: `row_loss` without the logits."""
    s = linear_row_stats(input, linear_weight, target, **stats_arguments)  # type: ignore[arg-type]
    return reduce_rows(loss(s), s, reduction)
