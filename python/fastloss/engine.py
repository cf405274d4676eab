"""The rows engine as users call it: statistics of given logits or of a linear head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import autograd, autograd_terms
from .autograd import Options
from .contract import Want
from .statistics import RowStats, pack
from .terms import HLGauss, RowTerm, TeacherHead
from .wide import Asked, Wide, ask

_WANT = {
    "entropy": Want.ENTROPY,
    "sum": Want.SUM,
    "sumsq": Want.SUM | Want.SUMSQ,
    "tempered_lse": Want.TEMPERED,
    "argmax": Want.ARGMAX,
    "teacher_lse": Want.TEACHER,
    "teacher_mean": Want.TEACHER_MEAN,
    "score_mean": Want.SCORE_MEAN,
}
_WIDE_ONLY = Want.TEACHER | Want.TEACHER_MEAN | Want.SCORE_MEAN


def want_flags(names: Iterable[str]) -> Want:
    """The flags of the statistics named."""
    want = Want.NOTHING
    for name in (names,) if isinstance(names, str) else names:
        if name not in _WANT:
            raise ValueError(f"unknown statistic {name!r}: one of {', '.join(_WANT)}")
        want |= _WANT[name]
    return want


def check_rows(logits_or_input: Tensor, vocab: int, target: Tensor | None, column_weight: Tensor | None) -> None:
    """Raise for what kernels would read wrongly: dtypes, devices and the shape of the column weights."""
    x = logits_or_input
    if not x.is_floating_point():
        raise TypeError(f"takes a floating dtype, got {x.dtype}")
    if target is not None and target.device != x.device:
        raise ValueError(f"target is on {target.device}, the scores on {x.device}")
    if column_weight is None:
        return
    if column_weight.shape != (vocab,):
        raise ValueError(f"column_weight must have shape ({vocab},), got {tuple(column_weight.shape)}")
    if column_weight.device != x.device:
        raise ValueError(f"column_weight is on {column_weight.device}, the scores on {x.device}")
    if column_weight.requires_grad:
        raise ValueError("the gradient with respect to `column_weight` is not computed: pass column_weight.detach()")


def split_target(
    target: Tensor | None, rows: int, vocab: int, shape: torch.Size, shift: bool, ignore_index: int
) -> tuple[Tensor | None, Tensor | None]:
    """(class ids [N] or None, probabilities [N, V] or None) from what the user gave as target."""
    if shift and (target is None or target.is_floating_point() or not shape):
        raise ValueError("shift needs class ids with a last dimension of positions as target")
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
    target = target.to(torch.int64)
    return (shifted(target, ignore_index) if shift else target).reshape(rows), None


def shifted(target: Tensor, ignore_index: int) -> Tensor:
    """Targets of the next position along the last dim; the last position has none. Only the ids are copied."""
    if not target.dim() or not target.shape[-1]:
        return torch.full_like(target, ignore_index)
    return torch.cat((target[..., 1:], target.new_full((*target.shape[:-1], 1), ignore_index)), -1)


def options(ignore_index: int, want: int, scale: float, softcap: float | None) -> Options:
    """Checked options of a row op."""
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise TypeError("logit_scale is a number; to train a scale, multiply the input of the head by it")
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
    if t.device != like.device:
        raise ValueError(f"temperature is on {t.device}, the scores on {like.device}")
    if t.numel() != 1 and t.shape != shape:
        raise ValueError(f"temperature must hold 1 number or have shape {tuple(shape)}, got {tuple(t.shape)}")
    return t.to(acc).reshape(-1).expand(rows).contiguous()


def asks_wide(
    wide: Wide, warm: Tensor | None, o: Options, like: Tensor, vocab: int, shape: torch.Size, ids: Tensor | None,
    prob: Tensor | None, column_weight: Tensor | None, adds_weight: bool = False,
) -> Asked | None:  # fmt: skip
    """The call of `row_terms` that the arguments ask for, or None where `row_stats` serves them."""
    trained = warm is not None and warm.requires_grad
    # row_stats has E_p[z] from the rest's maximum, and an entropy's gradient cancels in it where p_y is near 1.
    plain = warm is None and prob is None and column_weight is None and not adds_weight
    entropy = bool(o.want & Want.ENTROPY) and plain
    if not (wide.given or trained or entropy or o.want & _WIDE_ONLY):
        if warm is not None and not o.want & Want.TEMPERED:
            raise ValueError('only "tempered_lse" and a teacher reads `temperature`: divide the logits by it instead')
        return None
    if prob is not None or column_weight is not None:
        raise ValueError(
            "a teacher, listed columns, a subset or a trained temperature go with class ids as target and without "
            "column_weight; probabilities as a target are a teacher of log-probabilities"
        )
    want = Want(o.want) & ~Want.TEMPERED
    if trained and not want & Want.ENTROPY:  # E_p[z] for the gradient of the LSE, not as a statistic by itself
        want |= Want.ENTROPY | Want.TEMPERED
    return ask(wide, ids, warm, want, like, vocab, shape, o.ignore_index, o.scale, o.softcap)


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
    shift: bool = False,
    listed: Tensor | None = None,
    teacher: Tensor | None = None,
    term: RowTerm | None = None,
    subset: Tensor | None = None,
    generated: HLGauss | None = None,
) -> RowStats:
    """Differentiable statistics of every row of z = softcap(logit_scale * logits); softcap(z) = c tanh(z / c).

    logits: [..., V], float32, float16, bfloat16 or float64. target: class ids [...] (any integer dtype), probabilities
    [..., V] (then differentiable too), or None. stats: names of the statistics wanted besides the target logit and the
    LSE of the rest: "entropy", "sum", "sumsq", "tempered_lse" (LSE(z / temperature)), "argmax". column_weight [V]: the
    c_j of "sum" and of probabilities. temperature: a number > 0, or one a row [...]. shift: compare position t with the
    target of t + 1 along the last target dim (causal language models; the logits are not copied).

    What follows makes the result a `WideRowStats`, with p = softmax(z / temperature); not together with probabilities
    or column_weight. listed: class ids [..., K] whose scores are statistics too, left out of the rest (negative ids:
    absent). teacher: logits [..., V], or [V] for all rows; q = softmax(teacher / temperature). term: one of
    `fastloss.terms`, a function of student and teacher summed over the columns. subset: bool [V], columns whose LSE is
    wanted. generated: `fastloss.terms.HLGauss`, a teacher made in the kernel. stats then also: "teacher_lse" (of
    teacher / temperature), "teacher_mean" (E_p[teacher]), "score_mean" (E_q[z]); "entropy" is that of p. A temperature
    that needs a gradient (it has one through tempered_lse) counts as one of these.

    Raises ValueError and TypeError for wrong shapes, dtypes and names; IndexError (CPU) for a class id out of range.
    """
    if logits.dim() < 1:
        raise ValueError("logits must have a last dimension of classes, got shape ()")
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    rows = shape.numel()
    want = want_flags(stats)
    check_rows(logits, vocab, target, column_weight)
    ids, prob = split_target(target, rows, vocab, shape, shift, ignore_index)
    wide = Wide(listed, teacher, term, subset, generated)
    want, temperature = wide.simplify(want, temperature)
    warm = _temperature(temperature, want, rows, shape, logits)
    o = options(ignore_index, want, logit_scale, softcap)
    if asked := asks_wide(wide, warm, o, logits, vocab, shape, ids, prob, column_weight):
        return asked.pack(*autograd_terms.row_terms(logits.reshape(rows, vocab), asked.operands, asked.options))
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
    shift: bool = False,
    listed: Tensor | None = None,
    teacher: Tensor | TeacherHead | None = None,
    term: RowTerm | None = None,
    subset: Tensor | None = None,
    generated: HLGauss | None = None,
    max_extra_bytes: int | None = None,
    grad_weight: Tensor | None = None,
) -> RowStats:
    """`row_stats` of logits = input linear_weightᵀ + linear_bias, which are never stored; made again in the backward.

    input: [..., D]. linear_weight: [V, D]. linear_bias: [V]. max_extra_bytes bounds the logits held at a time.
    teacher: logits, or a `TeacherHead` whose logits are never stored either (and which gets no gradient).
    grad_weight: a float32 [V, D] buffer (Megatron's main_grad) that the backward adds dW to, exactly, instead of
    leaving it in linear_weight.grad; not with a teacher, listed columns, a subset or a trained temperature.
    """
    wide = Wide(listed, teacher, term, subset, generated)
    h = head(
        input, linear_weight, target, linear_bias, stats, column_weight, temperature, ignore_index, logit_scale, softcap,
        shift, wide, grad_weight is not None,
    )  # fmt: skip
    check_grad_weight(grad_weight, linear_weight)
    return h.stats(extra_bytes(max_extra_bytes), grad_weight)


class Head(NamedTuple):
    """The checked operands of a linear head, rows flattened; `asked` where `row_terms` serves it."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    row: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # target, prob, column_weight, temperature
    options: Options
    shape: torch.Size
    asked: Asked | None

    def stats(self, limit: int, grad_weight: Tensor | None) -> RowStats:
        """The statistics, by mode R."""
        if self.asked is not None:
            if grad_weight is not None:
                raise ValueError(
                    "grad_weight goes with a target alone: no teacher, list, subset or trained temperature"
                )
            return self.asked.pack(*autograd_terms.linear_row_terms(self.x, self.w, self.bias, self.asked, limit))
        ids, prob, column_weight, warm = self.row
        out = autograd.linear_row_stats(self.x, self.w, self.bias, *self.row, self.options, limit, grad_weight)
        return pack(*out, ids, prob is not None, self.w.shape[0], self.options, column_weight, warm, self.shape)


def head(
    input: Tensor, linear_weight: Tensor, target: Tensor | None, linear_bias: Tensor | None, stats: Iterable[str],
    column_weight: Tensor | None, temperature: float | Tensor | None, ignore_index: int, logit_scale: float,
    softcap: float | None, shift: bool, wide: Wide, adds_weight: bool = False,
) -> Head:  # fmt: skip
    """Check what `linear_row_stats` was given; adds_weight: dW is to be added to a `grad_weight`."""
    check_head(input, linear_weight, linear_bias)
    shape, vocab = input.shape[:-1], linear_weight.shape[0]
    rows = shape.numel()
    want = want_flags(stats)
    check_rows(input, vocab, target, column_weight)
    ids, prob = split_target(target, rows, vocab, shape, shift, ignore_index)
    want, temperature = wide.simplify(want, temperature)
    warm = _temperature(temperature, want, rows, shape, input)
    o = options(ignore_index, want, logit_scale, softcap)
    asked = asks_wide(wide, warm, o, input, vocab, shape, ids, prob, column_weight, adds_weight)
    x = input.reshape(rows, input.shape[-1])
    return Head(x, linear_weight, linear_bias, (ids, prob, column_weight, warm), o, shape, asked)


def check_grad_weight(buffer: Tensor | None, weight: Tensor) -> None:
    """The buffer that dW is added to must be float32, of the weight's shape, on its device."""
    if buffer is None:
        return
    if buffer.shape != weight.shape or buffer.dtype != torch.float32 or buffer.device != weight.device:
        raise ValueError(
            f"grad_weight must be torch.float32 {tuple(weight.shape)} on {weight.device}, "
            f"got {buffer.dtype} {tuple(buffer.shape)} on {buffer.device}"
        )


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
