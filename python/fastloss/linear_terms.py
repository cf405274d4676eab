"""`row_terms` of a linear head whose logits are never stored: chunks of rows around the row kernels of any backend.

The teacher of a chunk is a slice of the logits that were given, or made from its own head by one more GEMM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import registry
from .autograd_terms import TermOperands, TermOptions
from .chunked import _Gradients, _lifted, _pick, _pick_some, _Problem, _rows_in_use, chunk_rows
from .contract import TermStat, Want
from .kept_memory import empty_beside
from .reference import accumulator
from .registry import kernel
from .terms import TeacherHead

#: Rows of a chunk of `fused`: two heads' GEMMs of 1024 rows cost a tenth less than those of 512 on a CPU.
FUSED_ROWS = 1024

Coefficients = Callable[[Tensor, Tensor, TermOperands], tuple[Tensor, Tensor]]


class _Rows(NamedTuple):
    """The operands of one call, ignored rows taken out."""

    problem: _Problem
    operands: TermOperands
    head: TeacherHead | None
    used: Tensor | None  # indices of the rows that are not ignored, None for all

    def teacher(self, part: slice, buffer: list[Tensor]) -> Tensor | None:
        """The teacher's scores of these rows; the buffer is used again for the next chunk."""
        if self.head is None:
            t = self.operands.teacher
            return t if t is None or t.shape[0] == 1 else t[part]
        x, w, bias, scale, softcap = self.head
        rows = part.stop - part.start
        if not buffer:
            buffer.append(empty_beside(x, (rows, w.shape[0]), x.dtype))
        t = buffer[0][:rows]
        if bias is None:
            torch.mm(x[part], w.T, out=t)
        else:
            torch.addmm(bias.to(t.dtype), x[part], w.T, out=t)
        if scale != 1:
            t.mul_(scale)
        return t.div_(softcap).tanh_().mul_(softcap) if softcap else t

    def of(self, part: slice, buffer: list[Tensor]) -> TermOperands:
        """The operands of these rows."""
        o = self.operands
        return TermOperands(
            None if o.listed is None else o.listed[part],
            self.teacher(part, buffer),
            None if o.value is None else o.value[part],
            o.subset,
            None if o.temperature is None else o.temperature[part],
        )


def _prepare(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    operands: TermOperands,
    head: TeacherHead | None,
    o: TermOptions,
    limit: int,
    rows: int = 0,
) -> _Rows:
    first = None if operands.listed is None or not operands.listed.shape[1] else operands.listed[:, 0]
    index = _rows_in_use(x, first, o.ignore_index)
    teacher = operands.teacher
    if teacher is not None and teacher.shape[0] != 1:
        teacher = _pick_some(teacher, index)
    x_used = x if index is None else x.index_select(0, index)
    picked = TermOperands(
        _pick_some(operands.listed, index), teacher, _pick_some(operands.value, index), operands.subset,
        _pick_some(operands.temperature, index),
    )  # fmt: skip
    if head is not None:
        head = head._replace(input=_pick(head.input, index))
        limit = max(1, limit // 2) if limit else 0  # two matrices of a chunk at a time; 0 is no limit
    return _Rows(_Problem(x_used, w, bias, None, None, chunk_rows(x_used, w, limit, rows)), picked, head, index)


def _backward_over(
    z: Tensor, coef: Tensor, stats: Tensor, argmax: Tensor, operands: TermOperands, o: TermOptions
) -> Tensor:
    """dz, over z itself where the backend can."""
    args = (coef, stats, argmax, z, *operands, *o)
    in_place = "row_terms_backward_"
    return registry.run(in_place if registry.able(in_place, *args) else "row_terms_backward", *args)


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    operands: TermOperands,
    head: TeacherHead | None,
    o: TermOptions,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """(stats [17 + K, N], argmax)."""
    r = _prepare(x, w, bias, operands, head, o, limit)
    n, k = x.shape[0], 0 if operands.listed is None else operands.listed.shape[1]
    table = x.new_zeros(TermStat.LISTED + k, n, dtype=accumulator(x[:0]).dtype)
    best = x.new_full((n if o.want & Want.ARGMAX else 0,), -1, dtype=torch.int64)
    buffer: list[Tensor] = []
    for part, z in r.problem.chunks():
        stats, argmax = registry.run("row_terms", z, *r.of(part, buffer), *o)
        where = part if r.used is None else r.used[part]
        table[:, where] = stats
        if len(best):
            best[where] = argmax
    return table, best


def backward(
    coef: Tensor, stats: Tensor, argmax: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, operands: TermOperands,
    head: TeacherHead | None, o: TermOptions, needs: int, limit: int, grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dw, dbias), the logits made again."""
    r = _prepare(x, w, bias, operands, head, o, limit)
    coef, unlift = _lifted(coef, x.dtype)
    coef, stats = _pick(coef, r.used, 1), _pick(stats, r.used, 1)
    argmax = _pick(argmax, r.used) if len(argmax) else argmax
    gradients = _Gradients(r.problem, needs, grad_weight, unlift)
    buffer: list[Tensor] = []
    for part, z in r.problem.chunks():
        best = argmax[part] if len(argmax) else argmax
        gradients.add(part, _backward_over(z, coef[:, part], stats[:, part], best, r.of(part, buffer), o))
    return gradients.result(r.used, x.shape[0], bias)


def _lift(r: _Rows) -> float:
    """One lift for all chunks, from the size of a mean's share: float16 coefficients would be subnormal."""
    return 2.0 ** math.floor(math.log2(max(1, len(r.problem.x))))


def separable(
    x: Tensor, w: Tensor, bias: Tensor | None, operands: TermOperands, head: TeacherHead | None, o: TermOptions,
    needs: int, limit: int, coefficients: Coefficients,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Mode C: (sum of the losses, dx, dw, dbias), the logits made once.

    coefficients(stats, argmax, operands) of a chunk -> (sum of its losses, coef).
    """
    r = _prepare(x, w, bias, operands, head, o, limit)
    total = x.new_zeros((), dtype=accumulator(x[:0]).dtype)
    lift = _lift(r) if x.dtype == torch.float16 else None
    gradients = _Gradients(r.problem, needs, None, None if lift is None else total.new_tensor(1 / lift))
    buffer: list[Tensor] = []
    for part, z in r.problem.chunks():
        rows = r.of(part, buffer)
        stats, argmax = registry.run("row_terms", z, *rows, *o)
        value, coef = coefficients(stats, argmax, rows)
        total += value
        gradients.add(part, _backward_over(z, coef if lift is None else coef * lift, stats, argmax, rows, o))
    return total, *gradients.result(r.used, x.shape[0], bias, wide=True)


_BOTH = "row_terms_both_"


def can_fuse(x: Tensor, operands: TermOperands, head: TeacherHead | None, o: TermOptions, nll_share: float) -> bool:
    """Whether `fused` serves this call: a backend has the kernel, and -log p of nothing but a target is asked for."""
    k = 0 if operands.listed is None else operands.listed.shape[1]
    if o.want & Want.ARGMAX or (nll_share and k != 1):
        return False
    teacher = operands.teacher if head is None else head.input
    return registry.able(_BOTH, x, operands.listed, teacher)


def fused(
    x: Tensor, w: Tensor, bias: Tensor | None, operands: TermOperands, head: TeacherHead | None, o: TermOptions,
    needs: int, limit: int, nll_share: float, term_share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(stats, dx, dw, dbias) of the sum over rows of nll_share (-log p_y) + term_share term: one launch a chunk.

    What `stats` holds besides the term and -log p_y is said in compiled_terms.py.
    """
    r = _prepare(x, w, bias, operands, head, o, limit, FUSED_ROWS)
    k = 0 if operands.listed is None else operands.listed.shape[1]
    table = x.new_zeros(TermStat.LISTED + k, x.shape[0], dtype=accumulator(x[:0]).dtype)
    lift = _lift(r) if x.dtype == torch.float16 else 1.0
    gradients = _Gradients(r.problem, needs, None, table.new_tensor(1 / lift) if x.dtype == torch.float16 else None)
    buffer: list[Tensor] = []
    for part, z in r.problem.chunks():
        stats = registry.run(_BOTH, z, *r.of(part, buffer), *o, nll_share * lift, term_share * lift)
        table[:, part if r.used is None else r.used[part]] = stats
        gradients.add(part, z)
    return table, *gradients.result(r.used, x.shape[0], bias, wide=True)


def _operands(listed: Any, teacher: Any, value: Any, subset: Any, temperature: Any) -> TermOperands:
    return TermOperands(listed, teacher, value, subset, temperature)


def _head(x: Tensor | None, w: Tensor | None, bias: Tensor | None, scale: float, softcap: float) -> TeacherHead | None:
    return None if x is None or w is None else TeacherHead(x, w, bias, scale, softcap or None)


def _linear_row_terms(
    x: Tensor, w: Tensor, bias: Tensor | None, teacher_x: Tensor | None, teacher_w: Tensor | None,
    teacher_bias: Tensor | None, listed: Tensor | None, teacher: Tensor | None, value: Tensor | None,
    subset: Tensor | None, temperature: Tensor | None, ignore_index: int, want: int, scale: float, softcap: float,
    term: int, a: float, b: float, c: float, teacher_scale: float, teacher_softcap: float, limit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    head = _head(teacher_x, teacher_w, teacher_bias, teacher_scale, teacher_softcap)
    o = TermOptions(ignore_index, want, scale, softcap, term, a, b, c)
    return forward(x, w, bias, _operands(listed, teacher, value, subset, temperature), head, o, limit)


def _linear_row_terms_backward(
    coef: Tensor, stats: Tensor, argmax: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, teacher_x: Tensor | None,
    teacher_w: Tensor | None, teacher_bias: Tensor | None, listed: Tensor | None, teacher: Tensor | None,
    value: Tensor | None, subset: Tensor | None, temperature: Tensor | None, ignore_index: int, want: int, scale: float,
    softcap: float, term: int, a: float, b: float, c: float, teacher_scale: float, teacher_softcap: float, needs: int,
    limit: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head = _head(teacher_x, teacher_w, teacher_bias, teacher_scale, teacher_softcap)
    o = TermOptions(ignore_index, want, scale, softcap, term, a, b, c)
    operands = _operands(listed, teacher, value, subset, temperature)
    return backward(coef, stats, argmax, x, w, bias, operands, head, o, needs, limit)


for _backend in registry.BACKENDS:  # each chunk runs on whichever row kernel the registry finds, or was told to take
    kernel("linear_row_terms", _backend)(_linear_row_terms)
    kernel("linear_row_terms_backward", _backend)(_linear_row_terms_backward)
