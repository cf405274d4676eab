"""A compressed head as operand of `fastloss.functional.linear_cross_entropy`: its dense weight never exists as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import functional
from ..autograd import Options
from ..contract import Needs
from ..engine import check_rows, extra_bytes, shifted
from ..engine import options as row_options
from ..fused import pack
from ..statistics import coefficients, largest
from . import head_chunks  # noqa: F401  (defines the ops)
from .compressed_tensor import CompressedTensor
from .linear import autocast, multiplied


class _RowStats(torch.autograd.Function):
    """(stats, top, argmax) as `autograd.linear_row_stats` has them; gradients of x and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, blob: Tensor, target: Tensor | None, prob: Tensor | None,
        column_weight: Tensor | None, plan: Sequence[int], dtype: torch.dtype, o: Options, limit: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        stats, argmax = torch.ops.fastloss.compressed_row_stats(
            x, blob, plan, dtype, bias, target, prob, column_weight, *o, limit
        )
        ctx.plan, ctx.dtype, ctx.options, ctx.limit = plan, dtype, o, limit
        ctx.mark_non_differentiable(argmax)
        ctx.save_for_backward(x, bias, blob, target, prob, column_weight, stats, argmax)
        ctx.set_materialize_grads(False)
        return stats, largest(stats, o.want, prob is not None), argmax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_stats: Tensor | None, g_top: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        x, bias, blob, target, prob, column_weight, stats, argmax = ctx.saved_tensors
        o: Options = ctx.options
        g_stats = torch.zeros_like(stats) if g_stats is None else g_stats
        coef = coefficients(g_stats, g_top, stats, target is not None, prob is not None, None, o.want)
        needs = int(ctx.needs_input_grad[0]) * Needs.INPUT | int(ctx.needs_input_grad[1]) * Needs.BIAS
        d_x, d_bias = torch.ops.fastloss.compressed_row_stats_backward(
            coef,
            stats,
            argmax,
            x,
            blob,
            ctx.plan,
            ctx.dtype,
            bias,
            target,
            prob,
            column_weight,
            *o,
            int(needs),
            ctx.limit,
        )
        nothing = (None,) * 8
        return d_x if needs & Needs.INPUT else None, d_bias if needs & Needs.BIAS else None, *nothing


def linear_cross_entropy(
    input: Tensor, linear_weight: CompressedTensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: str = "mean", ignore_index: int | None = None,
    label_smoothing: float = 0.0, options: Any = None, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0, shift: bool = False, returns: Iterable[str] = (), max_extra_bytes: int | None = None,
    grad_weight: Tensor | None = None, skip_ignored: bool = False,
) -> Any:  # fmt: skip
    """`fastloss.functional.linear_cross_entropy` of a compressed head [V, D]; gradients of input and linear_bias.

    The vocabulary is taken in chunks of rows: a chunk is decoded, its logits join the row's running statistics, and it is
    gone; the backward decodes it again. `max_extra_bytes` (32 MiB where it is not given) bounds a chunk of at least
    16 rows and its logits.

    Raises what `linear_cross_entropy` raises, and ValueError for what the dense weight's gradient or a second derivative
    needs (`grad_weight`, target probabilities that require a gradient) and for K-dimensional heads.
    """
    shape = linear_weight.header.shape
    if len(shape) != 2:
        raise ValueError(f"a compressed linear_weight is [V, D], got shape {list(shape)}")
    if grad_weight is not None:
        raise ValueError("grad_weight cannot be used: a compressed linear_weight is frozen and has no gradient")
    functional._check_tensors(input=input, target=target)
    if not functional._legal(reduction, label_smoothing):
        raise ValueError(
            f"reduction must be none, mean or sum and label_smoothing within 0..1, got {reduction!r}, {label_smoothing}"
        )
    extras = functional._extras(z_loss, softcap, logit_scale, shift, returns)
    x, bias, vocab = _operands(input, linear_weight, linear_bias)
    batch = input.shape[:-1]
    soft = target.shape == (*batch, vocab) and target.is_floating_point()
    if soft and (ignore_index is not None or shift):
        raise ValueError("ignore_index and shift need class ids as target, got probabilities")
    if soft and target.requires_grad:
        raise ValueError("target probabilities of a compressed head get no gradient: pass target.detach()")
    if not soft and (target.shape != batch or target.is_floating_point()):
        raise ValueError(
            f"target must be class ids {list(batch)} or probabilities {[*batch, vocab]}, got {target.dtype} "
            f"{list(target.shape)}"
        )
    check_rows(input, vocab, target, weight)
    ignore = -100 if ignore_index is None else ignore_index
    ids = None if soft else target.to(torch.int64)
    if ids is not None:
        ids = (shifted(ids, ignore) if shift else ids).reshape(-1)
    limit = extra_bytes(max_extra_bytes)
    chunk = getattr(options, "batch_chunk_size", None)
    if not limit and chunk:
        limit = chunk * vocab * input.element_size()
    x = x.reshape(-1, shape[1])
    used = None
    if skip_ignored and ids is not None:
        used = torch.nonzero(ids != ignore)[:, 0]
        x, ids = x.index_select(0, used), ids.index_select(0, used)
    prob = target.reshape(-1, vocab) if soft else None
    o = row_options(ignore, extras.want(label_smoothing), logit_scale, softcap)
    held = (linear_weight.blob, ids, prob, weight, linear_weight.plan, linear_weight.dtype)
    raw: tuple[Tensor, Tensor, Tensor] = _RowStats.apply(x, bias, *held, o, limit)
    s = pack(*raw, ids, soft, vocab, o, weight)
    loss = functional._finish(s, ids, weight, label_smoothing, extras, reduction)
    loss = loss.to(functional._loss_dtype(x, target, soft))
    numbers = {name: getattr(s, name) for name in extras.returns}
    if used is not None:
        numbers = {k: t.new_zeros(batch.numel()).index_copy(0, used, t) for k, t in numbers.items()}
        loss = loss.new_zeros(batch.numel()).index_copy(0, used, loss) if reduction == "none" else loss
    loss = loss.reshape(batch) if reduction == "none" else loss
    return (loss, {k: t.reshape(batch) for k, t in numbers.items()}) if extras.returns else loss


def _operands(input: Tensor, weight: CompressedTensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """Input and bias as they are multiplied (autocast's dtype), and the number of classes; or why they cannot be."""
    vocab, columns = weight.header.shape
    x, bias = multiplied(input, weight.dtype), None if bias is None else autocast(bias, weight.dtype)
    if x.dim() < 1 or x.shape[-1] != columns:
        raise RuntimeError(
            f"input must be [..., {columns}] for linear_weight {[vocab, columns]}, got {list(input.shape)}"
        )
    if bias is not None and (bias.shape != (vocab,) or bias.dtype != x.dtype or bias.device != x.device):
        raise RuntimeError(
            f"linear_bias must be {x.dtype} [{vocab}] on {x.device}, got {bias.dtype} {list(bias.shape)} on {bias.device}"
        )
    return x, bias, vocab
