"""The `triton` backend: row kernels on given logits, and tiled ones that recompute the logits of a linear head.

triton is imported when a launch is due, not with fastloss.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

from torch import Tensor

from .chunked import Chunked, RowKernels
from .compiled import why_not_linear, why_not_rows
from .compiled_pointwise import why_not_pointwise, why_not_upstream
from .contract import Want
from .device_checks import check_targets
from .registry import kernel


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _missing(x: Tensor) -> str | None:
    if not _installed():
        return "triton is not installed: pip install fastloss[triton]"
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"runs on CUDA tensors, got {x.device}"
    return None


def _why_not(logits: Tensor, target: Tensor | None, prob: Tensor | None, *_: Any) -> str | None:
    return _missing(logits) or why_not_rows(logits, prob)


def _why_not_chunked(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None, *_: Any
) -> str | None:
    return _missing(x) or why_not_linear(x, w, prob)


def _why_not_tiled(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: Tensor | None, *rest: Any
) -> str | None:
    if prob is not None:
        return "the tiled kernels take class ids, not probabilities"
    return _why_not_chunked(x, w, bias, target, prob)


@kernel("row_stats", "triton", _why_not)
def row_stats(logits: Tensor, target: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    from .triton_kernels import row_stats as kernels

    check_targets(target, logits.shape[1], args[3])
    return kernels.row_stats(logits, target, *args)


@kernel("row_stats_backward", "triton", lambda coef, stats, argmax, *a: _why_not(*a))
def row_stats_backward(*args: Any, out: Tensor | None = None) -> Tensor:
    from .triton_kernels import row_stats as kernels

    return kernels.row_stats_backward(*args, out=out)


@kernel("row_stats_backward_unless_one_", "triton", lambda dlogits, upstream, coef, stats, argmax, *a: _why_not(*a))
def row_stats_backward_unless_one_(dlogits: Tensor, upstream: Tensor, *args: Any) -> None:
    """row_stats_backward(*args) into dlogits, unless upstream, one number on the device, is 1."""
    from .triton_kernels import row_stats as kernels

    kernels.row_stats_backward(*args, out=dlogits, upstream=upstream.float())


@kernel("scale_unless_one_", "triton", lambda x, factor: _missing(x))
def scale_unless_one_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, one number on the device; nothing is read or written where it is 1."""
    from .triton_kernels import scale as kernels

    kernels.scale_unless_one_(x, factor.float())


@kernel("cross_entropy", "triton", _why_not)
def cross_entropy(
    logits: Tensor, target: Tensor | None, *args: Any, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_kernels import row_stats as kernels

    check_targets(target, logits.shape[1], args[3])
    return kernels.cross_entropy(logits, target, *args, out=out)


def _cross_entropy_in_place(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return cross_entropy(logits, *args, out=logits)


def _row_stats_backward_in_place(coef: Tensor, stats: Tensor, argmax: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return row_stats_backward(coef, stats, argmax, logits, *args, out=logits)


_chunked = Chunked(RowKernels(row_stats, _row_stats_backward_in_place, _cross_entropy_in_place))
kernel("linear_cross_entropy", "triton", _why_not_chunked)(_chunked.linear_cross_entropy)


@kernel("linear_row_stats", "triton", _why_not_tiled)
def linear_row_stats(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None, prob: None, *args: Any
) -> tuple[Tensor, Tensor]:
    from .triton_kernels import linear_row_stats as kernels

    *tail, _max_extra_bytes = args
    check_targets(target, w.shape[0], tail[2])
    return kernels.linear_row_stats(x, w, bias, target, *tail)


def _backward(
    coef: Tensor, stats: Tensor, argmax: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor | None,
    prob: None, *args: Any, grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .triton_kernels import linear_row_stats as kernels

    *tail, max_extra_bytes = args
    width = max_extra_bytes // max(1, x.shape[0] * x.element_size())  # columns of dz held at a time
    limit = {"width": max(1, width)} if max_extra_bytes else {}
    return kernels.linear_row_stats_backward(
        coef, stats, argmax, x, w, bias, target, *tail, grad_weight=grad_weight, **limit
    )


kernel("linear_row_stats_backward", "triton", lambda coef, stats, argmax, *a: _why_not_tiled(*a))(_backward)


@kernel("linear_row_stats_backward_into", "triton", lambda coef, stats, argmax, grad_weight, *a: _why_not_tiled(*a))
def linear_row_stats_backward_into(
    coef: Tensor, stats: Tensor, argmax: Tensor, grad_weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    dx, _, db = _backward(coef, stats, argmax, *args, grad_weight=grad_weight)
    return dx, db


def _why_not_pointwise(input: Tensor, *args: Any) -> str | None:
    return _missing(input) or why_not_pointwise(input, *args)


@kernel("pointwise_loss", "triton", _why_not_pointwise)
def pointwise_loss(*args: Any) -> tuple[Tensor, Tensor]:
    from .triton_kernels import pointwise_loss as kernels

    return kernels.pointwise_loss(*args)


@kernel(
    "pointwise_loss_backward", "triton", lambda up, x, *args: _why_not_pointwise(x, *args) or why_not_upstream(up, x)
)
def pointwise_loss_backward(upstream: Tensor, *args: Any) -> Tensor:
    from .triton_kernels import pointwise_loss as kernels

    return kernels.pointwise_loss_backward(upstream, *args)


@kernel("pointwise_loss_backward_unless_one_", "triton", lambda dinput, upstream, *args: _why_not_pointwise(*args))
def pointwise_loss_backward_unless_one_(dinput: Tensor, upstream: Tensor, *args: Any) -> None:
    """pointwise_loss_backward(*args) into dinput, unless upstream, one number on the device, is 1."""
    from .triton_kernels import pointwise_loss as kernels

    kernels.pointwise_loss_backward(upstream.float(), *args, out=dinput, unless_one=True)


def _why_not_terms(
    logits: Tensor, listed: Tensor | None, teacher: Tensor | None, value: Tensor | None, subset: Tensor | None,
    temperature: Tensor | None, ignore_index: int, want: int, *_: Any,
) -> str | None:  # fmt: skip
    if value is not None and (teacher is not None or want & Want.TERM):
        return "takes target values without a teacher and without a term, whose numbers a, b, c they share"
    if teacher is not None and teacher.stride(-1) != 1 and teacher.shape[-1] > 1:
        return f"takes a teacher whose last dimension is contiguous, got strides {tuple(teacher.stride())}"
    return _missing(logits) or why_not_rows(logits, None)


@kernel("row_terms", "triton", _why_not_terms)
def row_terms(*args: Any) -> tuple[Tensor, Tensor]:
    from .triton_kernels import row_terms as kernels

    return kernels.row_terms(*args)


@kernel("row_terms_backward", "triton", lambda coef, stats, argmax, *a: _why_not_terms(*a))
def row_terms_backward(*args: Any, out: Tensor | None = None) -> Tensor:
    from .triton_kernels import row_terms as kernels

    return kernels.row_terms_backward(*args, out=out)
