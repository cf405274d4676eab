"""What the kernels of `row_terms` compute in a column: the terms f(a, b) with their slopes, and HL-Gauss probabilities.

Every function is traced into its caller. docs/design.md, "The terms contract", holds the definitions; the forms here are those
that keep their digits where scores and teacher agree, and that never multiply 0 by infinity.
"""

import triton
import triton.language as tl

from .common import capped, exp

# Bits of `want` beyond those of row_stats, and the terms, as in csrc/row_terms.h.
TEACHER = tl.constexpr(32)
TEACHER_MEAN = tl.constexpr(64)
SCORE_MEAN = tl.constexpr(128)
TERM_SUM = tl.constexpr(256)
SUBSET = tl.constexpr(512)
KL, MIXTURE, TOTAL_VARIATION = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LOG_COSH, BCE_LOGITS = tl.constexpr(4), tl.constexpr(5)  # these, and 6, are of scores, not of log-probabilities


@triton.jit
def product(weight, x):
    """weight * x, 0 where the weight is 0: a probability of a column of -inf, a coefficient that nobody asked for."""
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def nan_where(bad, x):
    # Not a global: triton compares those that two functions of one kernel read, and a NaN differs from itself.
    return tl.where(bad, float("nan"), x)


@triton.jit
def log1p_unit(e):
    """log(1 + e) for 0 <= e <= 1 to 2e-7, by the series of 2 atanh(e / (2 + e)): log itself would lose a small e."""
    s = e / (2.0 + e)
    x = s * s
    return 2.0 * s * (1.0 + x * (1 / 3 + x * (1 / 5 + x * (1 / 7 + x * (1 / 9 + x * (1 / 11))))))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p_unit(exp(-tl.abs(x)))


@triton.jit
def remainders(u):
    """(cosh u - 1, sinh u - u) for |u| < 1/2 by their series: differences of exponentials would cancel."""
    s = u * u
    return s * (1 / 2 + s * (1 / 24 + s * (1 / 720))), u * s * (1 / 6 + s * (1 / 120 + s * (1 / 5040)))


@triton.jit
def less_log1p(w):
    """w - log(1 + w) for -0.4 < w < 0.65, to a relative 1e-6."""
    s = w / (2.0 + w)
    x = s * s
    return s * (w - 2.0 * x * (1 / 3 + x * (1 / 5 + x * (1 / 7 + x * (1 / 9)))))


@triton.jit
def mixture_logs(u, beta):
    """(a - log m, b - log m) from u = a - b, m = beta q + (1 - beta) p."""
    log_beta, log_rest = tl.log(beta), tl.log(1.0 - beta)
    d = u + (log_rest - log_beta)
    small = log1p_unit(exp(-tl.abs(d)))
    return -log_rest - (tl.maximum(-d, 0.0) + small), -log_beta - (tl.maximum(d, 0.0) + small)


@triton.jit
def kl_value(a, b, p, q, first, second):
    """first q (e^u - 1 - u) + second p (e^-u - 1 + u), u = a - b = log p/q: every summand >= 0."""
    u = a - b
    even, odd = remainders(u)
    near = tl.abs(u) < 0.5
    of_q = tl.where(near, q * (even + odd), p - q - product(q, u))
    of_p = tl.where(near, p * (even - odd), q - p + product(p, u))
    return product(first, of_q) + product(second, of_p)


@triton.jit
def mixture_value(a, b, p, q, first, second, beta):
    """first q (w - log(1 + w)) + second p (x - log(1 + x)), 1 + w = m/q, 1 + x = m/p: every summand >= 0."""
    u = a - b
    even, odd = remainders(u)
    near = tl.abs(u) < 0.5
    w = tl.where(near, (1.0 - beta) * (u + odd + even), 0.0)
    x = tl.where(near, beta * (even - odd - u), 0.0)
    m = beta * q + (1.0 - beta) * p
    own, other = mixture_logs(u, beta)
    of_q = tl.where(near, q * less_log1p(w), m - q + product(q, other))
    of_p = tl.where(near, p * less_log1p(x), m - p + product(p, own))
    return product(first, of_q) + product(second, of_p)


@triton.jit
def log_cosh(x):
    """By log(1 + (cosh x - 1)) near 0, where |x| - log 2 would cancel."""
    y = tl.abs(x)
    even, _odd = remainders(tl.minimum(y, 0.5))
    return tl.where(y < 0.5, log1p_unit(even), y + log1p_unit(exp(-2.0 * y)) - 0.6931471805599453)


@triton.jit
def sigmoids(x):
    """(sigmoid(x), sigmoid(-x)), both to full precision."""
    e = exp(-tl.abs(x))
    high = 1.0 / (1.0 + e)
    low = e * high
    return tl.where(x >= 0, high, low), tl.where(x >= 0, low, high)


@triton.jit
def targets(b, t, TERM: tl.constexpr):
    """(y, 1 - y) of the binary cross entropies."""
    if TERM == BCE_LOGITS:
        y, other = sigmoids(b)
    else:
        y, other = t, 1.0 - t
    return y, other


@triton.jit
def term_value(a, b, p, q, t, first, second, third, TERM: tl.constexpr):
    """f(a, b) of each column."""
    if TERM == KL:
        return kl_value(a, b, p, q, first, second)
    elif TERM == MIXTURE:
        return mixture_value(a, b, p, q, first, second, third)
    elif TERM == TOTAL_VARIATION:
        return 0.5 * tl.abs(p - q)
    elif TERM == LOG_COSH:
        return log_cosh(0.5 * (a - b))
    else:
        # softplus(a) - y a with nothing to cancel where y is 1 and a large
        y, other = targets(b, t, TERM)
        return log1p_unit(exp(-tl.abs(a))) + other * tl.maximum(a, 0.0) + product(y, tl.maximum(-a, 0.0))


@triton.jit
def term_slope(a, b, p, q, t, first, second, third, TERM: tl.constexpr):
    """f_a of each column, in the contract's form."""
    if TERM == KL:
        return product(second, product(p, a - b + 1.0)) - first * q
    elif TERM == MIXTURE:
        own, _other = mixture_logs(a - b, third)
        share = first * q + second * p
        return product(second, product(p, own + 1.0)) - product(share, (1.0 - third) * exp(own))
    elif TERM == TOTAL_VARIATION:
        return tl.where(p > q, 0.5 * p, tl.where(p < q, -0.5 * p, 0.0 * (p + q)))
    elif TERM == LOG_COSH:
        return 0.5 * capped(0.5 * (a - b), 1.0)
    else:
        y, other = targets(b, t, TERM)
        high, low = sigmoids(a)
        return other * high - y * low


@triton.jit
def teacher_slope(a, b, p, q, first, second, third, TERM: tl.constexpr):
    """f_b of each column, of a term of log-probabilities: f_a of the same function with the roles exchanged."""
    if TERM == MIXTURE:
        return term_slope(b, a, q, p, a, second, first, 1.0 - third, TERM)
    else:
        return term_slope(b, a, q, p, a, second, first, third, TERM)


@triton.jit
def scaled_erfc(x):
    """e^(x^2) erfc(x) for x >= 0, to a relative 5e-7: a polynomial in 1 / (1 + x/2), fitted for the least relative error."""
    t = 1.0 / (1.0 + 0.5 * x)
    r = 0.06446143239736557 - 0.0255228653550148 * t
    r = 0.030753443017601967 + r * t
    r = -0.19854912161827087 + r * t
    r = 0.07946935296058655 + r * t
    r = 0.05826152488589287 + r * t
    r = 0.18041491508483887 + r * t
    r = 0.24651220440864563 + r * t
    r = 0.2821042239665985 + r * t
    return (0.2820947468280792 + r * t) * t


@triton.jit
def normal_mass(left, right):
    """(erf(right) - erf(left)) / 2. On one side of 0 by erfc, which keeps the digits of the tails that erf loses."""
    near, far = tl.minimum(tl.abs(left), tl.abs(right)), tl.maximum(tl.abs(left), tl.abs(right))
    tail = scaled_erfc(near) * exp(-near * near) - scaled_erfc(far) * exp(-far * far)
    return 0.5 * tl.where((left <= 0) & (right >= 0), tl.erf(right) - tl.erf(left), tail)


@triton.jit
def gauss_center(value, low, width, V):
    """The value, clamped to the bins; a NaN stays one."""
    clamped = tl.minimum(tl.maximum(value, low), low + width * V)
    return tl.where(value != value, value, clamped)


@triton.jit
def gauss_mass(first, last, center, low, width, sigma):
    """Mass of the Gaussian around `center` in the bins first..last."""
    inverse = 0.7071067811865476 / sigma
    start = low - center
    return normal_mass((start + first * width) * inverse, (start + last * width) * inverse)
