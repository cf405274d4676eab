"""The autograd Functions of `row_terms`, as autograd.py has them for `row_stats`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import ops, reference_terms  # noqa: F401  (ops registers what torch.ops.fastloss holds)
from .autograd import _differentiate, _needs, batched, forward_mode_active, functorch_active
from .contract import Needs, Term, TermStat, Want
from .reference import scores
from .term_statistics import EXCHANGED, exchanged, exchanged_stats, teacher_coefficients, term_coefficients

if TYPE_CHECKING:
    from .wide import Asked

_ops = torch.ops.fastloss


class TermOptions(NamedTuple):
    """What `row_terms` takes besides tensors, in the order of its schema."""

    ignore_index: int = -100
    want: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    term: int = 0
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0


class TermOperands(NamedTuple):
    """The tensors of `row_terms` besides the scores."""

    listed: Tensor | None = None
    teacher: Tensor | None = None
    value: Tensor | None = None
    subset: Tensor | None = None
    temperature: Tensor | None = None


#: Statistics whose own derivative in T no kernel makes.
_WARM = Want.TEACHER | Want.TEACHER_MEAN | Want.SCORE_MEAN | Want.TERM
_ROWS = 256  # whose derivatives PyTorch makes at a time


def temperature_gradient(
    grad: Tensor, stats: Tensor, temperature: Tensor, o: TermOptions, operands: Callable[[slice], tuple[Any, ...]]
) -> Tensor:
    """One number a row. d logsum / dT = -E_p[z - M] / T^2; with other statistics of p or q, by PyTorch.

    operands(rows): the logits, listed, teacher, value and subset of these rows, asked for in the second case only.
    """
    if o.want & Want.TEMPERED and not o.want & _WARM:  # E_p[z] is there for this alone (engine.asks_wide)
        d = -grad[TermStat.LOGSUM] * stats[TermStat.MEAN] / temperature.to(stats.dtype) ** 2
        return d.to(temperature.dtype)

    def of_rows(rows: slice) -> Tensor:
        fixed, own = operands(rows), temperature[rows].detach().requires_grad_()

        def compose(warm: Tensor) -> tuple[Tensor, ...]:
            return reference_terms.terms(*fixed, warm, *o)[:1]  # type: ignore[call-arg]

        (d,) = _differentiate(compose, (own,), (grad[:, rows],))
        return torch.zeros_like(own) if d is None else d

    n = temperature.shape[0]
    step = n if torch.compiler.is_compiling() else _ROWS
    return torch.cat([of_rows(slice(i, min(n, i + step))) for i in range(0, n, step)]) if n else temperature.detach()


def check_teacher(term: int, teacher: Tensor | None, want: int, rows: int) -> None:
    """Raise where the gradient of a teacher is asked for that is not made."""
    if teacher is None or not teacher.requires_grad or not torch.is_grad_enabled():
        return
    if teacher.shape[0] != rows:
        raise ValueError("the gradient of a teacher shared by all rows is not computed: pass teacher.detach()")
    if want & Want.TERM and term not in EXCHANGED:
        raise ValueError(f"the gradient of the teacher under {Term(term).name} is not computed: pass teacher.detach()")


def _forward(
    logits: Tensor, teacher: Tensor | None, temperature: Tensor | None, listed: Tensor | None, value: Tensor | None,
    subset: Tensor | None, o: TermOptions,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stats, argmax = _ops.row_terms.default(logits, listed, teacher, value, subset, temperature, *o)
    return stats, largest(stats, o.want), argmax


def largest(stats: Tensor, want: int) -> Tensor:
    """The largest score of each row; empty unless wanted."""
    return stats[TermStat.MAX].clone() if want & Want.ARGMAX else stats.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.options = inputs
    stats, _, argmax = output
    ctx.mark_non_differentiable(argmax)
    ctx.save_for_backward(*tensors, stats, argmax)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g_stats: Tensor | None, g_top: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    logits, teacher, temperature, listed, value, subset, stats, argmax = ctx.saved_tensors
    o: TermOptions = ctx.options
    nothing = (None,) * 4
    if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(g_stats)):

        def compose(logits: Tensor, teacher: Tensor | None, temperature: Tensor | None) -> tuple[Tensor, ...]:
            return reference_terms.terms(logits, listed, teacher, value, subset, temperature, *o)[:2]

        return *_differentiate(
            compose, (logits, teacher, temperature), (g_stats, g_top if len(argmax) else None)
        ), *nothing
    g_stats = torch.zeros_like(stats) if g_stats is None else g_stats
    d_logits = d_teacher = d_temperature = None
    if ctx.needs_input_grad[0]:
        coef = term_coefficients(g_stats, g_top, stats, temperature, o.want, o.term)
        d_logits = _ops.row_terms_backward.default(
            coef, stats, argmax, logits, listed, teacher, value, subset, temperature, *o
        )
    if ctx.needs_input_grad[1]:
        d_teacher = teacher_gradient(g_stats, stats, logits, listed, teacher, temperature, o)
    if ctx.needs_input_grad[2]:
        d_temperature = temperature_gradient(
            g_stats, stats, temperature, o,
            lambda rows: (logits[rows], _some(listed, rows), _some(teacher, rows), _some(value, rows), subset),
        )  # fmt: skip
    return d_logits, d_teacher, d_temperature, *nothing


def _some(t: Tensor | None, rows: slice) -> Tensor | None:
    """These rows, or the one row that all share."""
    return t if t is None or t.shape[0] == 1 else t[rows]


def teacher_gradient(
    grad: Tensor, stats: Tensor, logits: Tensor, listed: Tensor | None, teacher: Tensor, temperature: Tensor | None,
    o: TermOptions,
) -> Tensor:  # fmt: skip
    """The gradient of the teacher's scores, by the same kernel with the roles exchanged.

    Of the list only the rows that it ignores are left: one id each, ignore_index or one that is absent.
    """
    if listed is not None:
        absent = -1 if o.ignore_index != -1 else -2
        listed = torch.where(listed[:, :1] == o.ignore_index, o.ignore_index, absent)
    want = o.want & Want.TERM
    if o.want & Want.SCORE_MEAN:
        want |= Want.TEACHER_MEAN | Want.ENTROPY
    if o.want & Want.TEACHER_MEAN:
        want |= Want.SCORE_MEAN
    z = logits if o.scale == 1 and not o.softcap else scores(logits, o.scale, o.softcap)
    coef = teacher_coefficients(grad, stats, temperature, o.want, o.term)
    swapped, row = exchanged_stats(stats), coef.new_zeros(0 if listed is None else 1, coef.shape[1])
    exchanged_term = exchanged(o.term, o.a, o.b, o.c)
    return _ops.row_terms_backward.default(
        torch.cat((coef, row)), torch.cat((swapped, row)), stats.new_empty(0, dtype=torch.int64), teacher, listed, z,
        None, None, temperature, o.ignore_index, int(want), 1.0, 0.0, *exchanged_term,
    )  # fmt: skip


class _RowTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = _forward(*args)
        _setup(ctx, args, out)
        return out

    backward = staticmethod(_backward)


class _RowTermsFunctorch(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def row_terms(logits: Tensor, operands: TermOperands, o: TermOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(stats [17 + K, N], top, argmax), differentiable in the logits, the teacher and the temperature."""
    listed, teacher, value, subset, temperature = operands
    check_teacher(o.term, teacher, o.want, logits.shape[0])
    if forward_mode_active():
        return reference_terms.terms(logits, *operands, *o)  # type: ignore[arg-type]
    function = _RowTermsFunctorch if functorch_active() else _RowTerms
    return function.apply(logits, teacher, temperature, listed, value, subset, o)


# ---------------------------------------------------------------------------------------------- linear head, mode R


class _LinearOptions(NamedTuple):
    options: TermOptions
    teacher_scale: float
    teacher_softcap: float
    limit: int


def _linear_forward(
    x: Tensor, w: Tensor, bias: Tensor | None, teacher: Tensor | None, temperature: Tensor | None,
    listed: Tensor | None, value: Tensor | None, subset: Tensor | None, teacher_x: Tensor | None,
    teacher_w: Tensor | None, teacher_bias: Tensor | None, o: _LinearOptions,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stats, argmax = _ops.linear_row_terms.default(
        x, w, bias, teacher_x, teacher_w, teacher_bias, listed, teacher, value, subset, temperature, *o.options, *o[1:]
    )
    return stats, largest(stats, o.options.want), argmax


def _teacher_scores(
    teacher: Tensor | None, x: Tensor | None, w: Tensor | None, bias: Tensor | None, o: _LinearOptions
) -> Tensor | None:
    if x is None or w is None:
        return teacher
    return scores(torch.nn.functional.linear(x, w, bias), o.teacher_scale, o.teacher_softcap)


def _linear_backward(ctx: Any, g_stats: Tensor | None, g_top: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    x, w, bias, teacher, temperature, listed, value, subset, t_x, t_w, t_bias, stats, argmax = ctx.saved_tensors
    o: _LinearOptions = ctx.options
    options = o.options
    nothing = (None,) * 7
    if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(g_stats)):

        def compose(
            x: Tensor, w: Tensor, bias: Tensor | None, teacher: Tensor | None, temperature: Tensor | None
        ) -> tuple[Tensor, ...]:
            z, t = torch.nn.functional.linear(x, w, bias), _teacher_scores(teacher, t_x, t_w, t_bias, o)
            return reference_terms.terms(z, listed, t, value, subset, temperature, *options)[:2]

        grads = (g_stats, g_top if len(argmax) else None)
        return *_differentiate(compose, (x, w, bias, teacher, temperature), grads), *nothing
    g_stats = torch.zeros_like(stats) if g_stats is None else g_stats
    needs = _needs(ctx.needs_input_grad)
    d_teacher = d_temperature = None
    dx = dw = db = x.new_empty(0)
    if needs:
        coef = term_coefficients(g_stats, g_top, stats, temperature, options.want, options.term)
        dx, dw, db = _ops.linear_row_terms_backward.default(
            coef, stats, argmax, x, w, bias, t_x, t_w, t_bias, listed, teacher, value, subset, temperature, *options,
            o.teacher_scale, o.teacher_softcap, needs, o.limit,
        )  # fmt: skip
    if ctx.needs_input_grad[3]:  # the teacher's logits are stored, so the student's may be
        z = torch.nn.functional.linear(x, w, bias)
        d_teacher = teacher_gradient(g_stats, stats, z, listed, teacher, temperature, options)
    if ctx.needs_input_grad[4]:

        def operands(rows: slice) -> tuple[Tensor | None, ...]:
            t = _teacher_scores(_some(teacher, rows), _some(t_x, rows), t_w, t_bias, o)
            z = torch.nn.functional.linear(x[rows], w, bias)
            return z, _some(listed, rows), t, _some(value, rows), subset

        d_temperature = temperature_gradient(g_stats, stats, temperature, options, operands)
    return (
        dx if needs & Needs.INPUT else None,
        dw if needs & Needs.WEIGHT else None,
        db if needs & Needs.BIAS else None,
        d_teacher,
        d_temperature,
        *nothing,
    )


class _LinearRowTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = _linear_forward(*args)
        _setup(ctx, args, out)
        return out

    backward = staticmethod(_linear_backward)


class _LinearRowTermsFunctorch(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_linear_forward)
    setup_context = staticmethod(_setup)
    backward = staticmethod(_linear_backward)


def linear_row_terms(
    x: Tensor, w: Tensor, bias: Tensor | None, asked: Asked, limit: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(stats [17 + K, N], top, argmax) of x wᵀ + bias, differentiable; the logits are made again in the backward."""
    listed, teacher, value, subset, temperature = asked.operands
    check_teacher(asked.options.term, teacher, asked.options.want, x.shape[0])
    t_x, t_w, t_bias, scale, softcap = asked.head or (None, None, None, 1.0, None)
    o = _LinearOptions(asked.options, scale, softcap or 0.0, limit)
    if forward_mode_active():
        t = _teacher_scores(teacher, t_x, t_w, t_bias, o)
        z = torch.nn.functional.linear(x, w, bias)
        return reference_terms.terms(z, listed, t, value, subset, temperature, *o.options)  # type: ignore[arg-type]
    function = _LinearRowTermsFunctorch if functorch_active() else _LinearRowTerms
    return function.apply(x, w, bias, teacher, temperature, listed, value, subset, t_x, t_w, t_bias, o)
