"""F'(u), the slope of each surrogate of sign (docs/design.md, "binarize")."""

import triton
import triton.language as tl

IDENTITY, CLIP, APPROX, RESTE, BIPER, SWISH, FDA = (
    tl.constexpr(0),
    tl.constexpr(1),
    tl.constexpr(2),
    tl.constexpr(3),
    tl.constexpr(4),
    tl.constexpr(5),
    tl.constexpr(6),
)


@triton.jit
def slope(u, p0, p1, waves, SURROGATE: tl.constexpr):
    """`waves` is p1 + 1, the terms of FDA's series."""
    a = tl.abs(u)
    if SURROGATE == IDENTITY:
        return tl.full(u.shape, 1.0, tl.float32)
    elif SURROGATE == CLIP:
        return tl.where(a < p0, 1.0, 0.0)
    elif SURROGATE == APPROX:
        return tl.where(a < 1.0, 2.0 - 2.0 * a, 0.0)
    elif SURROGATE == RESTE:
        inverse = 1.0 / p0
        power = tl.exp2(tl.log2(tl.maximum(a, 0.1)) * ((1.0 - p0) * inverse)) * inverse
        line = tl.exp2(tl.full([1, 1], 3.321928094887362 * (1.0 - inverse), tl.float32))
        return tl.where(a <= p1, tl.where(a <= 0.1, line, power), 0.0)
    elif SURROGATE == BIPER:
        return p0 * tl.cos(p0 * u)
    elif SURROGATE == SWISH:
        x = tl.minimum(p0 * a, 80.0)  # the slope is 0 there
        e = tl.exp2(x * -1.4426950408889634)
        e1 = 1.0 + e
        # tanh(x / 2) = (1 - e) / (1 + e) and 1 + cosh(x) = (1 + e)^2 / (2 e): nothing overflows
        found = p0 * (2.0 - x * (1.0 - e) / e1) * (2.0 * e) / (e1 * e1)
        return tl.where(a == a, found, 0.0)
    else:
        total = tl.zeros_like(u)
        for i in range(0, waves):
            total += tl.cos((2.0 * i + 1.0) * p0 * u)
        return tl.where(a <= 1.0, 1.2732395447351628 * p0 * total, 0.0)
