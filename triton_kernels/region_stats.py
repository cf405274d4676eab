"""region_stats and region_stats_backward: statistics of regions of logits, and the gradient of any loss made of them.

The contract is docs/design.md, "The region contract". Nothing here waits for the GPU, and no sum depends on the order in
which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device, wide

# Bits of `want` and rows of `coef`, as in csrc/region_stats.h.
SQUARES, CROSS_ENTROPY, ENTROPY = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
SHARP, PROBABILITIES = tl.constexpr(8), tl.constexpr(16)
NUM_STATS = 10
FAR = tl.constexpr(126.0)  # sigmoid(-126) is 0 in fp32, and 0 * 126 is not 0 * inf
BLOCK, WARPS = 1024, 8


@triton.jit
def exp_of_minus(a):
    """e^-a for 0 <= a <= 126. a log2(e) is taken apart, or its rounding would be an error of 1e-5 at a = 80."""
    sixteenths = (a + 786432.0) - 786432.0  # a to 4 binary places: times 13 bits of log2(e) that is exact
    exact = sixteenths * 1.442626953125
    whole = (exact + 12582912.0) - 12582912.0
    rest = (exact - whole) + ((a - sixteenths) * 1.4426950408889634 + sixteenths * 6.80877639634e-05)
    return tl.exp2(-whole) * tl.exp2(-rest)


@triton.jit
def log1p_of(e):
    """log(1 + e) on [0, 1] as 2 artanh(e / (2 + e)); the interpreter has no libdevice."""
    s = e / (2.0 + e)
    z = s * s
    p = (((0.121504664 * z + 0.107138291) * z + 0.143084422) * z + 0.199994385) * z + 0.333333373
    return 2.0 * s * z * p + (s + s)


@triton.jit
def at_most(x, limit):
    return tl.where(x > limit, limit, x)  # NaN stays


@triton.jit
def sigmoids(x):
    """sigmoid(x), sigmoid(-x) and their product, none of them a difference."""
    e = exp_of_minus(at_most(tl.abs(x), FAR))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small), small * large


@triton.jit
def elements(logits, labels, mask, at, mask_at, inside, sharpness, WANT: tl.constexpr):
    """(x, t, 1 - t, counts; p, 1 - p, dp/dx of the confusion matrix; the same of sigmoid(x)), 0 where nothing counts."""
    counts = inside
    if mask is not None:
        counts = inside & (tl.load(mask + mask_at, mask=inside, other=0) != 0)
    x = tl.load(logits + at, mask=counts, other=0.0).to(tl.float32)
    t = tl.load(labels + at, mask=counts, other=0).to(tl.float32)
    one = tl.where(counts, 1.0, 0.0)
    plain_p, plain_q, plain_slope = sigmoids(x)
    p, q, slope = plain_p, plain_q, plain_slope
    if PROBABILITIES & WANT:
        p, q, slope = x, 1.0 - x, one
    if SHARP & WANT:
        outer = slope
        p, q, slope = sigmoids(0.5 * sharpness * (p - q))
        slope = sharpness * slope * outer
    return x, t, one - t, one, p, q, slope, plain_p, plain_q, plain_slope


@triton.jit
def place(region, block, P, mask_share, BLOCK: tl.constexpr):
    """(offsets of one block's values, of its mask, which of them lie inside the region)."""
    c = wide(block) * BLOCK + tl.arange(0, BLOCK)
    return wide(region) * P + c, wide(region // mask_share) * P + c, c < P


@triton.jit
def region_stats_kernel(logits, labels, mask, part, R, P, splits, mask_share, sharpness, WANT: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    region, split = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(tl.cdiv(P, BLOCK), splits)
    zero = tl.zeros([BLOCK], tl.float32)
    count, labelled, tp, fp, fn, tn = zero, zero, zero, zero, zero, zero
    error, squares, bce, entropy = zero, zero, zero, zero
    for b in range(split * blocks, (split + 1) * blocks):
        at, mask_at, inside = place(region, b, P, mask_share, BLOCK)
        x, t, f, one, p, q, _, plain_p, plain_q, _ = elements(
            logits, labels, mask, at, mask_at, inside, sharpness, WANT
        )  # fmt: skip
        count += one
        labelled += t
        tp += p * t
        fp += p * f
        fn += q * t
        tn += q * f
        if SQUARES & WANT:
            d = p * f - q * t
            error += d * d
            squares += t * t
        if (CROSS_ENTROPY | ENTROPY) & WANT:
            size = tl.abs(x)
            near = at_most(size, FAR)
            log1p = log1p_of(exp_of_minus(near))
            if CROSS_ENTROPY & WANT:
                wrong = tl.where(x < 0, t, f)  # 0 * inf where the logit is on the right side
                bce += one * log1p + tl.where(wrong == 0, 0.0, size * wrong)
            if ENTROPY & WANT:
                entropy += one * (tl.where(x < 0, plain_p, plain_q) * near + log1p)
    out = part + wide(split) * R + region
    step = wide(splits) * R
    tl.store(out, tl.sum(count, 0))
    tl.store(out + step, tl.sum(labelled, 0))
    tl.store(out + 2 * step, tl.sum(tp, 0))
    tl.store(out + 3 * step, tl.sum(fp, 0))
    tl.store(out + 4 * step, tl.sum(fn, 0))
    tl.store(out + 5 * step, tl.sum(tn, 0))
    tl.store(out + 6 * step, tl.sum(error, 0))
    tl.store(out + 7 * step, tl.sum(squares, 0))
    tl.store(out + 8 * step, tl.sum(bce, 0))
    tl.store(out + 9 * step, tl.sum(entropy, 0))


@triton.jit
def region_gradient_kernel(coef, logits, labels, mask, dlogits, R, P, mask_share, sharpness, WANT: tl.constexpr,
                           BLOCK: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(P, BLOCK)
    region, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    at, mask_at, inside = place(region, block, P, mask_share, BLOCK)
    x, t, f, one, p, q, slope, plain_p, plain_q, plain_slope = elements(
        logits, labels, mask, at, mask_at, inside, sharpness, WANT
    )  # fmt: skip
    c = coef + region
    n = wide(R)
    g = tl.load(c) * t + tl.load(c + n) * f
    if SQUARES & WANT:
        g += tl.load(c + 2 * n) * (p * f - q * t)
    g *= slope
    if CROSS_ENTROPY & WANT:
        g += tl.load(c + 3 * n) * (plain_p * f - plain_q * t)
    if ENTROPY & WANT:
        near = at_most(tl.abs(x), FAR)
        g -= tl.load(c + 4 * n) * tl.where(x < 0, -near, near) * plain_slope
    g = tl.where(one > 0, g, 0.0)  # whatever the coefficients are
    tl.store(dlogits + at, g.to(dlogits.dtype.element_ty), mask=inside)


def _bytes(t: Tensor | None) -> Tensor | None:
    return t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t


def _mask_share(logits: Tensor, mask: Tensor | None) -> int:
    return 1 if mask is None else len(logits) // len(mask)


def region_stats(
    logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float, splits: int, block: int = BLOCK
) -> Tensor:
    """Partial sums [10, splits, R] of contiguous regions [R, P]."""
    regions, size = logits.shape
    part = torch.empty(NUM_STATS, splits, regions, dtype=torch.float32, device=logits.device)
    with on_device(logits):
        region_stats_kernel[(regions, splits)](
            logits, _bytes(target), _bytes(mask), part, regions, size, splits, _mask_share(logits, mask), sharpness,
            WANT=int(want), BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return part


def region_stats_backward(
    coef: Tensor, logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float, block: int = BLOCK
) -> Tensor:
    """dlogits [R, P] from coefficients [5, R], contiguous."""
    regions, size = logits.shape
    dlogits = torch.empty_like(logits)
    if logits.numel():
        with on_device(logits):
            region_gradient_kernel[(regions * triton.cdiv(size, block),)](
                coef, logits, _bytes(target), _bytes(mask), dlogits, regions, size, _mask_share(logits, mask),
                sharpness, WANT=int(want), BLOCK=block, num_warps=WARPS,
            )  # fmt: skip
    return dlogits
