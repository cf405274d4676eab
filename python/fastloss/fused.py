"""Cross entropy with its gradient made in the forward: on logits (mode L) and on a linear head (mode C, three GEMMs).

Possible when the gradient of every row's loss is known beforehand up to one common factor, i.e. for the reductions "mean"
and "sum". The saved gradients are those for an upstream gradient of 1, which is what `loss.backward()` sends; nothing that
is saved and might be used again is ever written to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import losses, registry
from .autograd import Options, _differentiate, _ops, batched, keeps_graph
from .compiled import _C, DTYPES, pointer
from .contract import NUM_EPILOGUES, Needs
from .losses.cross_entropy import target_weight
from .reference import epilogue_coefficients, statistics
from .statistics import largest, pack


def direct(*tensors: Tensor | None) -> bool:
    """Plain tensors and nobody recording: kernels may be called without the dispatcher, and numbers may be looked at."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    )


class Formula(NamedTuple):
    """What cross entropy takes besides the operands; tensors are given separately."""

    options: Options
    label_smoothing: float
    z_loss: float
    reduction: str  # "mean" or "sum"
    max_extra_bytes: int = 0


def denominator(
    target: Tensor | None, n: int, class_weight: Tensor | None, ignore_index: int, reduction: str, like: Tensor
) -> Tensor:
    """What "mean" divides by, as torch has it: the weights of the valid targets; with probabilities, the rows."""
    if reduction == "sum":
        return like.new_ones(())
    if target is None:
        return like.new_full((), n)
    if class_weight is None:
        return (target != ignore_index).sum().to(like.dtype)
    return target_weight(target, class_weight, ignore_index, like.new_empty(target.shape)).sum()


def _epilogue(target: Tensor | None, n: int, v: int, class_weight: Tensor | None, f: Formula, share: Tensor) -> Tensor:
    """The four numbers a row of docs/design.md, "kBoth", for an upstream gradient of 1. share: 1 / denominator."""
    e = share.new_zeros(NUM_EPILOGUES, n)
    smoothing, soft = f.label_smoothing, target is None
    e[0] = (1 - smoothing) * share
    if class_weight is not None and not soft:
        e[0] *= target_weight(target, class_weight, f.options.ignore_index, e[0])
    if smoothing:
        total = float(v) if class_weight is None else class_weight.to(share.dtype).sum()
        e[1] = smoothing / v * total * share
        e[3] = -smoothing / v * share
    if f.z_loss:
        e[2] = f.z_loss * share
    return e


def _reduced(
    stats: Tensor, argmax: Tensor, target: Tensor | None, class_weight: Tensor | None, v: int, f: Formula, share: Tensor
) -> Tensor:
    top = largest(stats, f.options.want, target is None)
    s = pack(stats, top, argmax, target, target is None, v, f.options, class_weight)
    rows = losses.cross_entropy(s, class_weight=class_weight, label_smoothing=f.label_smoothing, z_loss=f.z_loss)
    return rows.sum() * share


def _share(target: Tensor | None, n: int, class_weight: Tensor | None, f: Formula, like: Tensor) -> Tensor:
    acc = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
    return 1 / denominator(target, n, class_weight, f.options.ignore_index, f.reduction, acc)


class _Terms:
    """The weights of the rows before the kernel, and the loss from the statistics after it.

    In a few tensor operations; on a CPU in two calls of C++, since there those operations would cost more than the
    kernel on small problems.
    """

    def __init__(
        self, x: Tensor, target: Tensor | None, n: int, v: int, class_weight: Tensor | None, f: Formula
    ) -> None:
        self.target, self.class_weight, self.v, self.formula = target, class_weight, v, f
        self.share: Tensor | None = None
        self.native = (
            x.device.type == "cpu" and x.dtype in DTYPES and _C is not None and direct(x, target, class_weight)
        )
        if self.native:
            self.weight = None if class_weight is None else class_weight.to(torch.float32).contiguous()
            self.ids = None if target is None else target.contiguous()
            self.epilogue = torch.empty(NUM_EPILOGUES, n, dtype=torch.float32, device="cpu")
            _C.cross_entropy_epilogue(*self._numbers(n), self.epilogue.data_ptr())  # type: ignore[union-attr]
        else:
            self.share = _share(target, n, class_weight, f, x)
            self.epilogue = _epilogue(target, n, v, class_weight, f, self.share)

    def _numbers(self, n: int) -> tuple[Any, ...]:
        f = self.formula
        return (
            pointer(self.ids), pointer(self.weight), n, self.v, f.options.ignore_index, f.label_smoothing, f.z_loss,
            f.reduction == "mean",
        )  # fmt: skip

    def loss(self, stats: Tensor, argmax: Tensor) -> Tensor:
        """The reduced loss."""
        if self.share is None and stats.dtype == torch.float32:
            numbers = self._numbers(stats.shape[1])
            value = _C.cross_entropy_loss(*numbers, self.epilogue.data_ptr(), stats.contiguous().data_ptr())  # type: ignore[union-attr]
            return stats.new_tensor(value)
        share = self.share
        if share is None:  # stats of another dtype than the native path's
            share = _share(self.target, stats.shape[1], self.class_weight, self.formula, stats)
        return _reduced(stats, argmax, self.target, self.class_weight, self.v, self.formula, share)


def _composition(
    z: Tensor, target: Tensor | None, prob: Tensor | None, class_weight: Tensor | None, f: Formula, share: Tensor
) -> Tensor:
    """The same loss by differentiable PyTorch ops, for second derivatives."""
    stats, _, argmax = statistics(z, target, prob, class_weight, None, *f.options)
    return _reduced(stats, argmax, target, class_weight, z.shape[1], f, share)


class CrossEntropy(torch.autograd.Function):
    """Scalar loss of logits [N, V]. One read of the logits and one write of their gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor | None, prob: Tensor | None, class_weight: Tensor | None, f: Formula
    ) -> Tensor:
        n, v = logits.shape
        terms = _Terms(logits, target, n, v, class_weight, f)
        # Straight to the kernel: this Function is never traced, and the dispatcher would cost more than a small kernel.
        stats, argmax, dlogits = registry.run(
            "cross_entropy", logits, target, prob, class_weight, terms.epilogue, *f.options
        )
        ctx.save_for_backward(logits, target, prob, class_weight, stats, argmax, terms.epilogue, dlogits)
        ctx.formula = f
        return terms.loss(stats, argmax)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, target, prob, class_weight, stats, argmax, epilogue, dlogits = ctx.saved_tensors
        f: Formula = ctx.formula
        if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(g)):
            share = _share(target, logits.shape[0], class_weight, f, logits)
            (d,) = _differentiate(lambda z: (_composition(z, target, prob, class_weight, f, share),), (logits,), (g,))
            return d, None, None, None, None
        keep = keeps_graph()

        def exact() -> Tensor:  # rather than dlogits * g, which in 16 bits would round twice
            coef = epilogue_coefficients(stats, epilogue * g.to(epilogue.dtype), prob is not None)
            return _ops.row_stats_backward.default(
                coef, stats, argmax, logits, target, prob, class_weight, None, *f.options
            )

        if g.device.type == "cpu":
            d = (dlogits.clone() if keep else dlogits) if g.item() == 1 else exact()
        else:  # whether g is 1 is known to the device alone; without keep nobody else holds dlogits
            d, up = dlogits.clone() if keep else dlogits, g.to(epilogue.dtype)
            coef = epilogue_coefficients(stats, epilogue * up, prob is not None)
            registry.run(
                "row_stats_backward_unless_one_", d, up, coef, stats, argmax, logits, target, prob, class_weight, None,
                *f.options,
            )  # fmt: skip
        return d, None, None, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """Scalar loss of x wᵀ + bias, all gradients made in the forward chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None,
        class_weight: Tensor | None, f: Formula, needs: int,
    ) -> Tensor:  # fmt: skip
        n, v = x.shape[0], w.shape[0]
        terms = _Terms(x, target, n, v, class_weight, f)
        stats, argmax, dx, dw, db = _ops.linear_cross_entropy.default(
            x, w, bias, target, prob, class_weight, terms.epilogue, *f.options, needs, f.max_extra_bytes
        )
        ctx.save_for_backward(x, w, bias, target, prob, class_weight, dx, dw, db)
        ctx.formula, ctx.needs = f, needs
        return terms.loss(stats, argmax)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, bias, target, prob, class_weight, dx, dw, db = ctx.saved_tensors
        f: Formula = ctx.formula
        nothing = (None,) * 5
        if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(g)):
            share = _share(target, x.shape[0], class_weight, f, x)

            def compose(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor]:
                z = torch.nn.functional.linear(x, w, bias)
                return (_composition(z, target, prob, class_weight, f, share),)

            return *_differentiate(compose, (x, w, bias), (g,)), *nothing
        grads = (dx, dw, db)
        if not direct(g, dx, dw) or keeps_graph():
            grads = tuple(d * g for d in grads)
        elif g.device.type != "cpu":
            up = g.float()
            for d in grads:
                if d.numel():
                    registry.run("scale_unless_one_", d, up)
        elif g.item() != 1:  # not in place: with saved_tensors_hooks the tensors may be the user's
            grads = tuple(d * g for d in grads)
        operands = (x, w, w if bias is None else bias)
        grads = tuple(d.to(t.dtype) for d, t in zip(grads, operands, strict=True))  # float16: float32 until here
        wanted = (Needs.INPUT, Needs.WEIGHT, Needs.BIAS)
        return *(d if ctx.needs & flag else None for d, flag in zip(grads, wanted, strict=True)), *nothing


def evaluate(
    logits: Tensor, target: Tensor | None, prob: Tensor | None, class_weight: Tensor | None, f: Formula
) -> Tensor:
    """The loss of logits, no gradient: one read of the logits."""
    terms = _Terms(logits, target, logits.shape[0], logits.shape[1], class_weight, f)
    return terms.loss(*registry.run("row_stats", logits, target, prob, class_weight, None, *f.options))


def evaluate_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None,
    class_weight: Tensor | None, f: Formula,
) -> Tensor:  # fmt: skip
    """The loss of a linear head, no gradient: one GEMM."""
    terms = _Terms(x, target, x.shape[0], w.shape[0], class_weight, f)
    stats, argmax, *_ = _ops.linear_cross_entropy.default(
        x, w, bias, target, prob, class_weight, terms.epilogue, *f.options, Needs.NOTHING.value, f.max_extra_bytes
    )
    return terms.loss(stats, argmax)
