"""One autograd.Function per op family. Forward and backward call the ops; everything the user says is settled before.

Each Function has a twin for torch.func, whose `setup_context` form costs 15 us a call. With create_graph the backward
differentiates the reference composition, so second derivatives are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, reference  # noqa: F401  (ops registers what torch.ops.fastloss holds)
from .contract import Needs, Stat
from .statistics import coefficients, largest

_ops = torch.ops.fastloss


class Options(NamedTuple):
    """What a row op takes besides tensors."""

    ignore_index: int = -100
    want: int = 0
    scale: float = 1.0
    softcap: float = 0.0


def can_look(x: Tensor) -> bool:
    """Whether the numbers of x may be looked at without waiting for a device or breaking a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not functorch_active()


def functorch_active() -> bool:
    """Inside torch.func.grad, vmap and the like."""
    return torch._C._are_functorch_transforms_active()


def batched(g: Tensor | None) -> bool:
    """Upstream gradients under torch.func, or under is_grads_batched=True, which our ops cannot take."""
    return functorch_active() or (g is not None and torch._C._functorch.is_legacy_batchedtensor(g))


def forward_mode_active() -> bool:
    """Inside forward-mode differentiation, where only the composition of PyTorch ops will do."""
    return torch.autograd.forward_ad._current_level >= 0


def keeps_graph() -> bool:
    """Whether the running backward may be followed by another one over the same graph."""
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return probe is None or bool(probe())


def _differentiate(
    compose: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of compose(*inputs), themselves differentiable; None where an input needs none."""
    wanted = [i for i in inputs if i is not None and i.requires_grad]

    def of_wanted(*given: Tensor) -> tuple[Tensor, ...]:
        new = iter(given)
        return tuple(compose(*(next(new) if i is not None and i.requires_grad else i for i in inputs)))

    with torch.enable_grad():  # torch.func.vjp also works where a transform's level has been left (jacrev, vjp)
        outputs, pull = torch.func.vjp(of_wanted, *wanted)  # type: ignore[misc]
        full = tuple(torch.zeros_like(o) if g is None else g.to(o.dtype) for o, g in zip(outputs, grads, strict=True))
        found = iter(pull(full))
    return [next(found) if i is not None and i.requires_grad else None for i in inputs]


# ---------------------------------------------------------------------------------------------- logits given


def _row_forward(
    logits: Tensor, target: Tensor | None, prob: Tensor | None, column_weight: Tensor | None,
    temperature: Tensor | None, o: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stats, argmax = _ops.row_stats.default(logits, target, prob, column_weight, temperature, *o)
    return stats, largest(stats, o.want, prob is not None), argmax


def _row_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, prob, column_weight, temperature, ctx.options = inputs
    stats, _, argmax = output
    ctx.mark_non_differentiable(argmax)
    ctx.save_for_backward(logits, target, prob, column_weight, temperature, stats, argmax)
    ctx.set_materialize_grads(False)


def _row_backward(ctx: Any, g_stats: Tensor | None, g_top: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    logits, target, prob, column_weight, temperature, stats, argmax = ctx.saved_tensors
    o: Options = ctx.options
    if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(g_stats)):

        def compose(logits: Tensor, prob: Tensor | None) -> tuple[Tensor, ...]:
            return reference.statistics(logits, target, prob, column_weight, temperature, *o)[:2]

        d_logits, d_prob = _differentiate(compose, (logits, prob), (g_stats, g_top if len(argmax) else None))
        return d_logits, None, d_prob, None, None, None
    g_stats = torch.zeros_like(stats) if g_stats is None else g_stats
    coef = coefficients(g_stats, g_top, stats, target is not None, prob is not None, temperature, o.want)
    d_logits = d_prob = None
    if ctx.needs_input_grad[0]:
        d_logits = _ops.row_stats_backward.default(
            coef, stats, argmax, logits, target, prob, column_weight, temperature, *o
        )
    if ctx.needs_input_grad[2]:
        d_prob = probability_gradient(g_stats, stats, reference.scores(logits, o.scale, o.softcap), column_weight)
        d_prob = d_prob.to(prob.dtype)
    return d_logits, None, d_prob, None, None, None


def probability_gradient(grad: Tensor, stats: Tensor, z: Tensor, column_weight: Tensor | None) -> Tensor:
    """d/dq_j of `target` = sum q c (z - ref) and `mass` = sum q c, for a target that is itself trained."""
    shifted = z - reference.finite(stats[Stat.MAX])[:, None]
    d = grad[Stat.TARGET][:, None] * shifted + grad[Stat.MASS][:, None]
    return d if column_weight is None else d * column_weight.to(d.dtype)


class _RowStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = _row_forward(*args)
        _row_setup(ctx, args, out)
        return out

    backward = staticmethod(_row_backward)


class _RowStatsFunctorch(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_row_forward)
    setup_context = staticmethod(_row_setup)
    backward = staticmethod(_row_backward)


def row_stats(
    logits: Tensor, target: Tensor | None, prob: Tensor | None, column_weight: Tensor | None,
    temperature: Tensor | None, options: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(stats [8, N], top, argmax), differentiable."""
    args = (logits, target, prob, column_weight, temperature)
    if forward_mode_active():
        return reference.statistics(*args, *options)
    function = _RowStatsFunctorch if functorch_active() else _RowStats
    return function.apply(*args, options)


# ---------------------------------------------------------------------------------------------- linear head, mode R


def _linear_forward(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None,
    column_weight: Tensor | None, temperature: Tensor | None, grad_weight: Tensor | None, o: Options, limit: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stats, argmax = _ops.linear_row_stats.default(x, w, bias, target, prob, column_weight, temperature, *o, limit)
    return stats, largest(stats, o.want, prob is not None), argmax


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.grad_weight, ctx.options, ctx.limit = inputs
    stats, _, argmax = output
    ctx.mark_non_differentiable(argmax)
    ctx.save_for_backward(*tensors, stats, argmax)
    ctx.set_materialize_grads(False)


def _needs(flags: Sequence[bool]) -> int:
    return int(flags[0]) * Needs.INPUT | int(flags[1]) * Needs.WEIGHT | int(flags[2]) * Needs.BIAS


def _linear_backward(ctx: Any, g_stats: Tensor | None, g_top: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    x, w, bias, target, prob, column_weight, temperature, stats, argmax = ctx.saved_tensors
    o: Options = ctx.options
    nothing = (None,) * 5
    if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(g_stats)):

        def compose(x: Tensor, w: Tensor, bias: Tensor | None, prob: Tensor | None) -> tuple[Tensor, ...]:
            z = torch.nn.functional.linear(x, w, bias)
            return reference.statistics(z, target, prob, column_weight, temperature, *o)[:2]

        dx, dw, db, dp = _differentiate(compose, (x, w, bias, prob), (g_stats, g_top if len(argmax) else None))
        return dx, dw, db, None, dp, *nothing
    g_stats = torch.zeros_like(stats) if g_stats is None else g_stats
    coef = coefficients(g_stats, g_top, stats, target is not None, prob is not None, temperature, o.want)
    needs = _needs(ctx.needs_input_grad)
    tail = (x, w, bias, target, prob, column_weight, temperature, *o, needs, ctx.limit)
    if ctx.grad_weight is not None and needs & Needs.WEIGHT:
        dx, db = _ops.linear_row_stats_backward_into.default(coef, stats, argmax, ctx.grad_weight, *tail)
        dw = None
    else:
        dx, dw, db = _ops.linear_row_stats_backward.default(coef, stats, argmax, *tail)
    d_prob = None
    if ctx.needs_input_grad[4]:
        z = reference.scores(torch.nn.functional.linear(x, w, bias), o.scale, o.softcap)
        d_prob = probability_gradient(g_stats, stats, z, column_weight).to(prob.dtype)
    return (
        dx if needs & Needs.INPUT else None,
        dw if needs & Needs.WEIGHT else None,
        db if needs & Needs.BIAS else None,
        None,
        d_prob,
        *nothing,
    )


class _LinearRowStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = _linear_forward(*args)
        _linear_setup(ctx, args, out)
        return out

    backward = staticmethod(_linear_backward)


class _LinearRowStatsFunctorch(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_linear_forward)
    setup_context = staticmethod(_linear_setup)
    backward = staticmethod(_linear_backward)


def linear_row_stats(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None,
    column_weight: Tensor | None, temperature: Tensor | None, options: Options, max_extra_bytes: int = 0,
    grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(stats [8, N], top, argmax) of x wᵀ + bias, differentiable; the logits are made again in the backward.

    `grad_weight`: a float32 [V, D] buffer that the backward adds dW to, in place of returning it.
    """
    args = (x, w, bias, target, prob, column_weight, temperature)
    if forward_mode_active():
        z = torch.nn.functional.linear(x, w, bias)
        return reference.statistics(z, target, prob, column_weight, temperature, *options)
    function = _LinearRowStatsFunctorch if functorch_active() else _LinearRowStats
    return function.apply(*args, grad_weight, options, max_extra_bytes)
