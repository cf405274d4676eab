"""Losses of the margin with their gradient made in the forward, at the cost of cross entropy.

dL/dz_j = phi'(d) (1[j = y] - pi_j): once the kernel knows the slope phi' (csrc/margin_loss.h), it writes the gradient
while the row is in cache, and a linear head needs three GEMMs. The value is made by the loss's own function of the
statistics. What is not covered (other reductions, probabilities, transforms, compilers) goes the way of any row loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import registry
from .autograd import Options, _differentiate, _ops, batched, forward_mode_active, functorch_active, keeps_graph
from .compiled import _C, DTYPES
from .contract import NUM_EPILOGUES, Needs
from .fused import denominator, direct
from .reference import statistics
from .statistics import RowStats, coefficients, pack

Rows = Callable[[RowStats], Tensor]


class Slope(NamedTuple):
    """phi'(d) as csrc/margin_loss.h numbers it, times `factor`, with the margin of scale * z."""

    loss: int
    a: float = 0.0
    b: float = 0.0
    factor: float = 1.0
    scale: float = 1.0


class Call(NamedTuple):
    """What a margin loss takes besides tensors."""

    rows: Rows  # one value a row from statistics of z as the user has it
    slope: Slope
    options: Options  # of z as the user has it
    reduction: str
    limit: int = 0

    @property
    def tail(self) -> tuple[int, float, float]:
        """ignore_index, scale, softcap of the kernel."""
        o = self.options
        return o.ignore_index, o.scale * self.slope.scale, o.softcap


def _share(target: Tensor, like: Tensor, call: Call) -> Tensor:
    like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
    return 1 / denominator(target, len(target), None, call.options.ignore_index, call.reduction, like)


def _value(stats: Tensor, target: Tensor, vocab: int, call: Call, share: Tensor) -> Tensor:
    s = pack(stats, stats.new_empty(0), target.new_empty(0), target, False, vocab, call.options, None)
    return torch.where(s.valid, call.rows(s), 0.0).sum() * share


def _native(target: Tensor, x: Tensor) -> bool:
    """On a CPU the dozen tensor operations around the kernel are two calls of C++."""
    return _C is not None and x.device.type == "cpu" and x.dtype in DTYPES and target.is_contiguous()


def _epilogue(target: Tensor, x: Tensor, vocab: int, call: Call) -> Tensor:
    """[4, N], of which the nll weighs the rows: factor / denominator."""
    n = len(target)
    if _native(target, x):
        e = torch.empty(NUM_EPILOGUES, n, dtype=torch.float32, device="cpu")
        ignore_index = call.options.ignore_index
        numbers = (target.data_ptr(), 0, n, vocab, ignore_index, 0.0, 0.0, call.reduction == "mean")
        _C.cross_entropy_epilogue(*numbers, e.data_ptr())  # type: ignore[union-attr]
        if call.slope.factor != 1:
            e[0] *= call.slope.factor
        return e
    e = torch.zeros(NUM_EPILOGUES, n, dtype=torch.float32, device=x.device)
    e[0] = _share(target, x, call) * call.slope.factor
    return e


def _loss(stats: Tensor, target: Tensor, x: Tensor, vocab: int, call: Call, epilogue: Tensor) -> Tensor:
    if _native(target, x) and stats.dtype == torch.float32 and stats.is_contiguous():
        mean, slope = call.reduction == "mean", call.slope
        total = _C.margin_loss_sum(  # type: ignore[union-attr]
            target.data_ptr(), len(target), vocab, call.options.ignore_index, mean, *slope[:3], epilogue.data_ptr(),
            stats.data_ptr(),
        )  # fmt: skip
        return stats.new_tensor(total)
    return _value(stats, target, vocab, call, _share(target, x, call))


class MarginLoss(torch.autograd.Function):
    """Scalar loss of logits [N, V]: one read of the logits and one write of their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, call: Call) -> Tensor:
        epilogue = _epilogue(target, logits, logits.shape[1], call)
        stats, dlogits = registry.run("margin_loss", logits, target, epilogue, *call.slope[:3], *call.tail)
        ctx.save_for_backward(logits, target, stats, dlogits)
        ctx.call = call
        return _loss(stats, target, logits, logits.shape[1], call, epilogue)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, target, stats, dlogits = ctx.saved_tensors
        call: Call = ctx.call
        if torch.is_grad_enabled() or batched(g):

            def compose(z: Tensor) -> tuple[Tensor]:
                table, _, _ = statistics(z, target, None, None, None, *_kernel_options(call))
                return (_value(table, target, z.shape[1], call, _share(target, z, call)),)

            return *_differentiate(compose, (logits,), (g,)), None, None
        if g.device.type == "cpu" and g.item() == 1:
            return (dlogits.clone() if keeps_graph() else dlogits), None, None
        # Made again rather than scaled: in 16 bits a scaled gradient is rounded twice. On a GPU nobody may look at g.
        coef = _coefficients(stats, target, logits, call, g)
        nothing = target.new_empty(0)
        o = _kernel_options(call)
        d = _ops.row_stats_backward.default(coef, stats, nothing, logits, target, None, None, None, *o)
        return d, None, None


def _kernel_options(call: Call) -> Options:
    ignore_index, scale, softcap = call.tail
    return Options(ignore_index, 0, scale, softcap)


def _coefficients(stats: Tensor, target: Tensor, logits: Tensor, call: Call, g: Tensor) -> Tensor:
    with torch.enable_grad():
        table = stats.detach().requires_grad_()
        value = _value(table, target, logits.shape[1], call, _share(target, logits, call)) * g
        (grad,) = torch.autograd.grad(value, table)
    return coefficients(grad, None, stats, True, False, None, 0)


class LinearMarginLoss(torch.autograd.Function):
    """Scalar loss of x wᵀ + bias, all gradients made in the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, call: Call, made: Any) -> Tensor:
        epilogue, stats, dx, dw, db = made
        ctx.save_for_backward(x, w, bias, target, dx, dw, db)
        ctx.call = call
        return _loss(stats, target, x, w.shape[0], call, epilogue)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, bias, target, *made = ctx.saved_tensors
        call: Call = ctx.call
        nothing = (None,) * 3
        if torch.is_grad_enabled() or batched(g):

            def compose(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor]:
                z = torch.nn.functional.linear(x, w, bias)
                table, _, _ = statistics(z, target, None, None, None, *_kernel_options(call))
                return (_value(table, target, w.shape[0], call, _share(target, x, call)),)

            return *_differentiate(compose, (x, w, bias), (g,)), *nothing
        same = g.device.type == "cpu" and not keeps_graph() and g.item() == 1
        grads = []
        for d, like, needed in zip(made, (x, w, w if bias is None else bias), ctx.needs_input_grad, strict=False):
            grads.append((d if same else d * g).to(like.dtype) if needed else None)
        return *grads, *nothing


def _plain(target: Tensor | None, reduction: str, *tensors: Tensor | None) -> bool:
    """Whether the shortcut may be taken at all."""
    return (
        target is not None
        and not target.is_floating_point()
        and reduction in ("mean", "sum")
        and torch.is_grad_enabled()
        and direct(target, *tensors)
        and not functorch_active()
        and not forward_mode_active()
    )


def on_logits(logits: Tensor, target: Tensor, call: Call) -> Tensor | None:
    """The loss of logits [N, V] and ids [N], or None where no kernel takes it."""
    if not _plain(target, call.reduction, logits) or not logits.requires_grad or not len(target):
        return None
    nothing = target.new_empty(0, dtype=torch.float32)
    if not registry.able("margin_loss", logits, target, nothing, *call.slope[:3], *call.tail):
        return None
    return MarginLoss.apply(logits, target, call)


def on_head(x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, call: Call) -> Tensor | None:
    """The loss of the head x wᵀ + bias, or None where no kernel takes it."""
    if not _plain(target, call.reduction, x, w, bias) or not len(target):
        return None
    needs = Needs.INPUT * x.requires_grad | Needs.WEIGHT * w.requires_grad
    needs |= Needs.BIAS * (bias is not None and bias.requires_grad)
    if not needs:
        return None
    epilogue = _epilogue(target, x, w.shape[0], call)
    args = (x, w, bias, target, epilogue, *call.slope[:3], *call.tail, int(needs), call.limit)
    if not registry.able("linear_margin_loss", *args):
        return None
    with torch.no_grad():
        made = registry.run("linear_margin_loss", *args)
    return None if made is None else LinearMarginLoss.apply(x, w, bias, target, call, (epilogue, *made))
