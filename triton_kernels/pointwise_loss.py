"""Pointwise losses: every operand is read once and every result written once. docs/design.md, "Pointwise losses".

The forms in which nothing cancels are those of csrc/cpu/pointwise_loss.inc.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INF, NAN, on_device, wide

BLOCK, WARPS = 4096, 8
BCE, KL = tl.constexpr(0), tl.constexpr(1)
NEVER, SELDOM, OFTEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how a weight is repeated


@triton.jit
def exponential(x):
    """e^x with what x log2(e) loses to rounding put back; beyond +-200 it is 0 or infinity."""
    x = tl.where(x > 200.0, 200.0, tl.where(x < -200.0, -200.0, x))
    high = x * 1.44269504
    low = tl.fma(x, 1.44269504, -high) + x * 1.92596303e-8
    return tl.exp2(high) * (1.0 + 0.693147181 * low)


@triton.jit
def twice_atanh(y):
    """2 atanh(y), |y| <= 1/3; csrc/cpu/simd_log.h."""
    s = y * y
    p = (((0.140870422 * s + 0.139807090) * s + 0.200124115) * s + 0.333331555) * s + 1.0
    return 2.0 * y * p


@triton.jit
def weights(weight, at, inside, start, period, REPEATED: tl.constexpr, BLOCK: tl.constexpr):
    """The weight of each element, 1 where there is none. No division of 64 bits for every element."""
    if weight is None:
        return tl.where(inside, 1.0, 0.0)
    else:
        place = at
        if REPEATED == OFTEN:  # in a block
            place = ((start % period).to(tl.int32) + tl.arange(0, BLOCK)) % period
        elif REPEATED == SELDOM:
            place = start % period + tl.arange(0, BLOCK)
            place = tl.where(place >= period, place - period, place)
        return tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def value_and_slope(x, t, w, p, KIND: tl.constexpr):
    """The loss of each element, and its derivative in x."""
    if KIND == BCE:
        e = exponential(-tl.abs(x))
        inverse = 1.0 / ((1.0 + e) * (2.0 + e))
        softplus = twice_atanh(e * (1.0 + e) * inverse)
        c = 1.0 + (p - 1.0) * t
        part = c * e * (2.0 + e) * inverse
        linear = tl.where(x < 0, -p * t, 1.0 - t)
        value = tl.where(x == -INF, NAN, linear * x + c * softplus)  # as in torch: inf - inf
        return w * value, w * (linear + tl.where(x < 0, part, -part))
    elif KIND == KL:
        log = tl.where(t == 0.0, 0.0, tl.log(tl.where(t == 0.0, 1.0, t)))
        return t * (log - x), -t
    else:
        q = exponential(t)
        return q * (t - x), -q


@triton.jit(do_not_specialize=["weight_period", "pos_weight_period"])
def pointwise_kernel(
    input, labels, weight, pos_weight, upstream, partial, values, dinput, count, weight_period, pos_weight_period, share,
    WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr, KIND: tl.constexpr, EACH: tl.constexpr, UNLESS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    factor = share
    if upstream is not None:
        if not EACH:
            by = tl.load(upstream).to(tl.float32)
            if UNLESS_ONE:
                if by == 1.0:
                    return
            factor = by * share
    start = wide(tl.program_id(0)) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(input + at, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(labels + at, mask=inside, other=0.0).to(tl.float32)
    w = weights(weight, at, inside, start, weight_period, WEIGHT, BLOCK)
    p = weights(pos_weight, at, inside, start, pos_weight_period, POS_WEIGHT, BLOCK)
    value, slope = value_and_slope(x, t, w, p, KIND)
    if partial is not None:
        tl.store(partial + tl.program_id(0), tl.sum(tl.where(inside, value, 0.0)))
    if values is not None:
        tl.store(values + at, value.to(values.dtype.element_ty), mask=inside)
    if dinput is not None:
        slope *= factor
        if upstream is not None:
            if EACH:
                slope *= tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dinput + at, slope.to(dinput.dtype.element_ty), mask=inside)


def repetition(weight: Tensor | None, count: int) -> int:
    """NEVER, SELDOM or OFTEN."""
    if weight is None or weight.numel() >= count:
        return NEVER.value
    return SELDOM.value if weight.numel() >= BLOCK else OFTEN.value


def _launch(
    input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: int, share: float, *,
    upstream: Tensor | None = None, partial: Tensor | None = None, values: Tensor | None = None,
    dinput: Tensor | None = None, unless_one: bool = False,
) -> None:  # fmt: skip
    count = input.numel()
    periods = (1 if w is None else w.numel() for w in (weight, pos_weight))
    repeated = {"WEIGHT": repetition(weight, count), "POS_WEIGHT": repetition(pos_weight, count)}
    each = upstream is not None and upstream.numel() != 1
    if count:
        with on_device(input):
            pointwise_kernel[(triton.cdiv(count, BLOCK),)](
                input, labels, weight, pos_weight, upstream, partial, values, dinput, count, *periods, float(share), **repeated,
                KIND=int(kind), EACH=each, UNLESS_ONE=unless_one, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip


def pointwise_loss(
    input: Tensor, labels: Tensor, weight: Tensor | None, pos_weight: Tensor | None, kind: int, share: float,
    reduce: bool, gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, dinput): share times the sum, or the value of each element; dinput is empty unless asked for."""
    dinput = torch.empty_like(input) if gradient else input.new_empty(0)
    into = {"dinput": dinput} if gradient else {}
    if not reduce:
        values = torch.empty_like(input, dtype=torch.promote_types(input.dtype, labels.dtype))
        _launch(input, labels, weight, pos_weight, kind, share, values=values, **into)
        return values, dinput
    partial = torch.empty(triton.cdiv(input.numel(), BLOCK), dtype=torch.float32, device=input.device)
    _launch(input, labels, weight, pos_weight, kind, share, partial=partial, **into)
    return (partial.sum(dtype=torch.float64) * share).float(), dinput


def pointwise_loss_backward(
    upstream: Tensor, *args: object, out: Tensor | None = None, unless_one: bool = False
) -> Tensor:
    """dinput, for one upstream gradient or one for each element; unless_one: nothing is done where the one is 1."""
    dinput = torch.empty_like(args[0]) if out is None else out  # type: ignore[call-overload]
    _launch(*args, upstream=upstream, dinput=dinput, unless_one=unless_one)  # type: ignore[arg-type]
    return dinput
