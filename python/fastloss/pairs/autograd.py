"""The autograd.Functions of pairs; the rules are those of autograd.py.

A gradient that autograd or torch.func wants to differentiate again (create_graph, vmap) comes from the reference of the
whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import _differentiate, batched, forward_mode_active, functorch_active
from ..contract import PairMapStat, PairNeeds
from . import ops, reference, reference_map  # noqa: F401  (ops registers what torch.ops.fastloss holds)
from .pairing import PAIRING_LENGTH, Pairing

_ops = torch.ops.fastloss
#: The inputs that have gradients: q, k, row_scale, column_scale.
DIFFERENTIABLE = 4


class Family(NamedTuple):
    """One op: how it and its backward are called, and its reference."""

    forward: Callable[..., tuple[Tensor, ...]]  # of all inputs; what is saved for the backward comes last
    outputs: int  # how many of those are outputs of the Function
    backward: Callable[..., tuple[Tensor | None, ...]]  # (grads, outputs, saved, inputs, needs)
    compose: Callable[..., tuple[Tensor, ...]]  # of all inputs, differentiable
    extra: tuple[int, ...] = ()  # further differentiable inputs, whose gradients `thresholds` makes
    thresholds: Callable[..., list[Tensor | None]] = lambda *_: []


def _needs(flags: tuple[bool, ...]) -> int:
    order = (PairNeeds.Q, PairNeeds.K, PairNeeds.ROW_SCALE, PairNeeds.COLUMN_SCALE)
    return int(sum(flag for flag, needed in zip(order, flags, strict=True) if needed))


def functions(family: Family) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """A family's Function of eager calls, and its twin for torch.func."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs]
        for saved in output[family.outputs :]:
            ctx.mark_non_differentiable(saved)
        ctx.save_for_backward(*(inputs[i] for i in ctx.places), *output)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        inputs, outputs = list(ctx.plain), tensors[len(ctx.places) :]
        for place, tensor in zip(ctx.places, tensors, strict=False):
            inputs[place] = tensor
        grads = grads[: family.outputs]
        wanted = (*range(DIFFERENTIABLE), *family.extra)
        result: list[Tensor | None] = [None] * len(inputs)
        if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and any(batched(g) for g in grads)):

            def compose(*given: Tensor) -> tuple[Tensor, ...]:
                full = list(inputs)
                for place, tensor in zip(wanted, given, strict=True):
                    full[place] = tensor
                return family.compose(*full)

            found = _differentiate(compose, [inputs[i] for i in wanted], grads)
            for place, gradient in zip(wanted, found, strict=True):
                result[place] = gradient
            return tuple(result)
        needs = _needs(ctx.needs_input_grad[:DIFFERENTIABLE])
        if needs:
            made = family.backward(grads, outputs, inputs, needs)
            result[:DIFFERENTIABLE] = [
                gradient if needed else None
                for gradient, needed in zip(made, ctx.needs_input_grad[:DIFFERENTIABLE], strict=True)
            ]
        for place, gradient in zip(family.extra, family.thresholds(grads, outputs, inputs), strict=False):
            result[place] = gradient if ctx.needs_input_grad[place] else None
        return tuple(result)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            outputs = family.forward(*inputs)
            setup(ctx, inputs, outputs)
            return outputs

    Eager.backward = staticmethod(backward)  # type: ignore[assignment]

    class Functorch(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(family.forward)
        setup_context = staticmethod(setup)

    Functorch.backward = staticmethod(backward)  # type: ignore[assignment]
    return Eager, Functorch


def apply(family: Family, functions: tuple[Any, Any], inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The outputs of a family's Function."""
    if forward_mode_active():
        return family.compose(*inputs)
    if torch.compiler.is_compiling():
        inputs = _distinct(inputs)
    return functions[functorch_active()].apply(*inputs)[: family.outputs]


def _distinct(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dynamo cannot trace a Function that is given one tensor twice (x with itself, the ids of both sides): views can be."""
    return tuple(
        x.view_as(x) if isinstance(x, Tensor) and any(x is y for y in inputs[:i]) else x for i, x in enumerate(inputs)
    )


# ---------------------------------------------------------------------------------------------- pair_stats

_STATS = Family(
    forward=lambda *inputs: _ops.pair_stats.default(*inputs),
    outputs=2,
    backward=lambda grads, outputs, inputs, needs: _ops.pair_stats_backward.default(*grads, *outputs, *inputs, needs),
    compose=lambda *inputs: reference.statistics(Pairing(*inputs[:PAIRING_LENGTH]), *inputs[PAIRING_LENGTH:-1]),
)
_STATS_FUNCTIONS = functions(_STATS)


def pair_stats(
    p: Pairing, boost: Tensor | None, margin: Tensor | None, want: int, second: float, keep: int
) -> tuple[Tensor, ...]:
    """(rows [9, M], columns [7, N]), differentiable with respect to q, k and the two scales."""
    return apply(_STATS, _STATS_FUNCTIONS, (*p, boost, margin, int(want), second, keep))


# ---------------------------------------------------------------------------------------------- pair_map


def _thresholds(grads: tuple[Tensor, ...], outputs: tuple[Tensor, ...], inputs: list[Any]) -> list[Tensor | None]:
    """x = z - neg_threshold, and pos_threshold - z: the table holds the sums of phi'."""
    grad, table = grads[0], outputs[0]
    return [
        -grad[PairMapStat.NEG] * table[PairMapStat.NEG_SLOPE],
        grad[PairMapStat.POS] * table[PairMapStat.POS_SLOPE],
    ]


_MAP = Family(
    forward=lambda *inputs: (_ops.pair_map.default(*inputs),),
    outputs=1,
    backward=lambda grads, outputs, inputs, needs: _ops.pair_map_backward.default(*grads, *inputs, needs),
    compose=lambda *inputs: (reference_map.map_table(Pairing(*inputs[:PAIRING_LENGTH]), *inputs[PAIRING_LENGTH:]),),
    extra=(PAIRING_LENGTH, PAIRING_LENGTH + 1),
    thresholds=_thresholds,
)
_MAP_FUNCTIONS = functions(_MAP)


def pair_map(p: Pairing, neg_threshold: Tensor | None, pos_threshold: Tensor | None, function: int) -> Tensor:
    """The table [8, M], differentiable in its first two rows with respect to q, k, the scales and the thresholds."""
    return apply(_MAP, _MAP_FUNCTIONS, (*p, neg_threshold, pos_threshold, int(function)))[0]


# ---------------------------------------------------------------------------------------------- pair_histogram

_HISTOGRAM = Family(
    forward=lambda *inputs: (_ops.pair_histogram.default(*inputs),),
    outputs=1,
    backward=lambda grads, outputs, inputs, needs: _ops.pair_histogram_backward.default(*grads, *inputs, needs),
    compose=lambda *inputs: (reference_map.histogram(Pairing(*inputs[:PAIRING_LENGTH]), *inputs[PAIRING_LENGTH:]),),
)
_HISTOGRAM_FUNCTIONS = functions(_HISTOGRAM)


def pair_histogram(p: Pairing, bins: int, first: float, step: float) -> Tensor:
    """The table [2, bins], differentiable with respect to q, k and the scales."""
    return apply(_HISTOGRAM, _HISTOGRAM_FUNCTIONS, (*p, bins, first, step))[0]
