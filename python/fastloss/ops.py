"""torch.library registration: one schema, one fake and one dispatcher entry per op.

`Library.define`/`impl` rather than `custom_op`: a quarter of the cost of a call. The ops are functional, private and not
differentiable by themselves; autograd.py is their only caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import registry
from .contract import NUM_STATS, Needs, TermStat, Want

_library = torch.library.Library("fastloss", "DEF")


def _define(schema: str, fake: Callable[..., Any], check: Callable[..., None] | None = None) -> None:
    """`check` raises where the arguments are not what the kernels read by; it gets all of them, defaults included."""
    name = schema[: schema.index("(")]

    def checked(*args: Any) -> Any:
        args = registry.complete(name, args)
        assert check is not None
        check(*args)
        return registry.run(name, *args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    run = checked if check is not None else lambda *args: registry.run(name, *args)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastloss::{name}", fake, lib=_library)
    arguments = getattr(torch.ops.fastloss, name).default._schema.arguments
    registry.declare(name, tuple(a.default_value if a.has_default_value() else None for a in arguments))


def _stats(like: Tensor, want: int) -> tuple[Tensor, Tensor]:
    n = like.shape[0]
    table = like.new_empty((NUM_STATS, n), dtype=torch.promote_types(like.dtype, torch.float32))
    return table, like.new_empty((n,) if want & Want.ARGMAX else (0,), dtype=torch.int64)


def _dense(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gradients(
    x: Tensor, w: Tensor, bias: Tensor | None, needs: int, wide: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    def like(t: Tensor | None, flag: Needs) -> Tensor:
        given = t is not None and bool(needs & flag)
        t = w if t is None else t
        dtype = torch.float32 if wide and t.dtype == torch.float16 else t.dtype
        return t.new_empty(t.shape if given else (0,), dtype=dtype)

    return like(x, Needs.INPUT), like(w, Needs.WEIGHT), like(bias, Needs.BIAS)


_ROW = "Tensor? target=None, Tensor? prob=None, Tensor? column_weight=None"
_TAIL = "int ignore_index=-100, int want=0, float scale=1.0, float softcap=0.0"
_SAVED = "Tensor coef, Tensor stats, Tensor argmax"
_HEAD = "Tensor x, Tensor w, Tensor? bias=None"


def _row_stats_fake(
    logits, target=None, prob=None, column_weight=None, temperature=None, ignore_index=-100, want=0, *_
):
    return _stats(logits, want)


def _cross_entropy_fake(logits, target, prob, column_weight, epilogue, ignore_index=-100, want=0, *_):
    return *_stats(logits, want), _dense(logits)


def _linear_row_stats_fake(
    x, w, bias=None, target=None, prob=None, column_weight=None, temperature=None, ignore_index=-100, want=0, *_
):
    return _stats(x, want)


def _linear_backward_fake(
    coef, stats, argmax, x, w, bias=None, target=None, prob=None, column_weight=None, temperature=None,
    ignore_index=-100, want=0, scale=1.0, softcap=0.0, needs=7, max_extra_bytes=0,
):  # fmt: skip
    return _gradients(x, w, bias, needs)


def _linear_cross_entropy_fake(
    x, w, bias, target, prob, column_weight, epilogue,
    ignore_index=-100, want=0, scale=1.0, softcap=0.0, needs=7, max_extra_bytes=0,
):  # fmt: skip
    return *_stats(x, want), *_gradients(x, w, bias, needs, wide=True)


_define(f"row_stats(Tensor logits, {_ROW}, Tensor? temperature=None, {_TAIL}) -> (Tensor, Tensor)", _row_stats_fake)
_define(
    f"row_stats_backward({_SAVED}, Tensor logits, {_ROW}, Tensor? temperature=None, {_TAIL}) -> Tensor",
    lambda coef, stats, argmax, logits, *_: _dense(logits),
)
_define(
    f"cross_entropy(Tensor logits, Tensor? target, Tensor? prob, Tensor? column_weight, Tensor epilogue, {_TAIL})"
    " -> (Tensor, Tensor, Tensor)",
    _cross_entropy_fake,
)
_define(  # row_stats_backward into dlogits; where upstream, one number on the device, is 1, dlogits stands already
    f"row_stats_backward_unless_one_(Tensor(a!) dlogits, Tensor upstream, {_SAVED}, Tensor logits, {_ROW},"
    f" Tensor? temperature=None, {_TAIL}) -> ()",
    lambda *_: None,
)
_define("scale_unless_one_(Tensor(a!) x, Tensor factor) -> ()", lambda *_: None)
_define(
    f"linear_row_stats({_HEAD}, {_ROW}, Tensor? temperature=None, {_TAIL}, int max_extra_bytes=0) -> (Tensor, Tensor)",
    _linear_row_stats_fake,
)
_define(
    f"linear_row_stats_backward({_SAVED}, {_HEAD}, {_ROW}, Tensor? temperature=None, {_TAIL}, int needs=7,"
    " int max_extra_bytes=0) -> (Tensor, Tensor, Tensor)",
    _linear_backward_fake,
)
_define(  # dW is added to grad_weight, float32, instead of being returned
    f"linear_row_stats_backward_into(Tensor coef, Tensor stats, Tensor argmax, Tensor(a!) grad_weight, {_HEAD}, {_ROW},"
    f" Tensor? temperature=None, {_TAIL}, int needs=7, int max_extra_bytes=0) -> (Tensor, Tensor)",
    lambda coef, stats, argmax, grad_weight, x, w, bias=None, *rest: _gradients(
        x, w, bias, rest[8] if len(rest) > 8 else 7
    )[::2],
)
# The gradients of float16 operands come back in float32: those of a mean are too small for it, and the upstream gradient,
# a loss scale of 2^16 perhaps, is multiplied in only later.
_define(
    f"linear_cross_entropy(Tensor x, Tensor w, Tensor? bias, Tensor? target, Tensor? prob, Tensor? column_weight,"
    f" Tensor epilogue, {_TAIL}, int needs=7, int max_extra_bytes=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_cross_entropy_fake,
)
_TERMS = (
    "Tensor? listed=None, Tensor? teacher=None, Tensor? value=None, Tensor? subset=None, Tensor? temperature=None,"
    f" {_TAIL}, int term=0, float a=0.0, float b=0.0, float c=0.0"
)


def _row_terms_fake(
    logits, listed=None, teacher=None, value=None, subset=None, temperature=None, ignore_index=-100, want=0, *_
):
    n, k = logits.shape[0], 0 if listed is None else listed.shape[1]
    table = logits.new_empty((int(TermStat.LISTED) + k, n), dtype=torch.promote_types(logits.dtype, torch.float32))
    return table, logits.new_empty((n,) if want & Want.ARGMAX else (0,), dtype=torch.int64)


_define(f"row_terms(Tensor logits, {_TERMS}) -> (Tensor, Tensor)", _row_terms_fake)
_define(
    f"row_terms_backward({_SAVED}, Tensor logits, {_TERMS}) -> Tensor",
    lambda coef, stats, argmax, logits, *_: _dense(logits),
)
_LINEAR_TERMS = f"{_HEAD}, Tensor? teacher_x=None, Tensor? teacher_w=None, Tensor? teacher_bias=None, {_TERMS}"
_LINEAR_TERMS += ", float teacher_scale=1.0, float teacher_softcap=0.0"


def _linear_row_terms_fake(
    x, w, bias=None, teacher_x=None, teacher_w=None, teacher_bias=None, listed=None, teacher=None, value=None,
    subset=None, temperature=None, ignore_index=-100, want=0, *_,
):  # fmt: skip
    return _row_terms_fake(x, listed, want=want)


def _linear_row_terms_backward_fake(coef, stats, argmax, x, w, bias=None, *rest):
    return _gradients(x, w, bias, rest[18] if len(rest) > 18 else 7)


_define(f"linear_row_terms({_LINEAR_TERMS}, int max_extra_bytes=0) -> (Tensor, Tensor)", _linear_row_terms_fake)
_define(
    f"linear_row_terms_backward({_SAVED}, {_LINEAR_TERMS}, int needs=7, int max_extra_bytes=0) -> (Tensor, Tensor, Tensor)",
    _linear_row_terms_backward_fake,
)
_define(
    "row_sample(Tensor logits, Tensor seed, Tensor streams, float scale=1.0, float softcap=0.0) -> (Tensor, Tensor)",
    lambda logits, *_: (
        logits.new_empty(logits.shape[0], dtype=torch.int64),
        logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32)),
    ),
)


def _pointwise_loss_fake(
    input, labels, weight=None, pos_weight=None, kind=0, share=1.0, reduce=True, gradient=False
):  # fmt: skip
    if reduce:
        loss = input.new_empty((), dtype=torch.promote_types(input.dtype, torch.float32))
    else:
        loss = _dense(input).to(torch.promote_types(input.dtype, labels.dtype))
    return loss, _dense(input) if gradient else input.new_empty((0,))


_ELEMENTS = "Tensor input, Tensor labels, Tensor? weight=None, Tensor? pos_weight=None, int kind=0, float share=1.0"
_define(f"pointwise_loss({_ELEMENTS}, bool reduce=True, bool gradient=False) -> (Tensor, Tensor)", _pointwise_loss_fake)
_define(  # upstream: one number, or one for each element
    f"pointwise_loss_backward(Tensor upstream, {_ELEMENTS}) -> Tensor", lambda upstream, input, *_: _dense(input)
)
_define(f"pointwise_loss_backward_unless_one_(Tensor(a!) dinput, Tensor upstream, {_ELEMENTS}) -> ()", lambda *_: None)

from . import backend_cpp, backend_cuda, backend_reference, backend_triton, sampling  # noqa: E402,F401  (they register their kernels)
