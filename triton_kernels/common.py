"""What the row kernels share: numbers, the score of a logit, targets, the terms of the gradient, and the merge of partial rows.

Every jitted function but `merge_kernel` is traced into its caller. docs/design.md, "The row contract", says what each number is.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

NEG_INF = tl.constexpr(float("-inf"))
INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
NOWHERE = tl.constexpr(2147483647)  # beyond every column index

# Bits of `want`, rows of `stats` and rows of `coef`, as in csrc/fastloss.h.
ENTROPY = tl.constexpr(1)
SUM = tl.constexpr(2)
SUMSQ = tl.constexpr(4)
TEMPERED = tl.constexpr(8)
ARGMAX = tl.constexpr(16)
NUM_STATS = 8
STAT_MAX, STAT_LOGSUM, STAT_LOGSUM_T = tl.constexpr(0), tl.constexpr(1), tl.constexpr(6)
OWN, REST, REST_Z, COLUMN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LINEAR, REST_T, ARG = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)

# Rows of `part`, the state of one row over one split of the columns. Sums are kept relative to `base`, the max of the rest
# in the split's first block: a common offset costs no accuracy, and nothing is rescaled in the loop.
NUM_PARTS = 13
P_MAX, P_SUM, P_TARGET, P_MOMENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
P_WEIGHTED, P_WEIGHT, P_SQUARES, P_PLAIN = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
P_COUNT, P_TEMPERED, P_BASE, P_MASS, P_BEST = (
    tl.constexpr(8),
    tl.constexpr(9),
    tl.constexpr(10),
    tl.constexpr(11),
    tl.constexpr(12),
)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors say."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def unit_columns(name: str, x: Tensor) -> Tensor:
    """x, whose columns the kernels read without a stride."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} must have stride 1 in its last dimension, got strides {tuple(x.stride())}")
    return x


def row_table(table: Tensor) -> Tensor:
    """A table of numbers a row ([k, n], perhaps a slice of a larger one), readable with stride 1 along the rows."""
    return table if table.stride(-1) == 1 else table.contiguous()


def new_statistics(like: Tensor, n: int, want: int) -> tuple[Tensor, Tensor]:
    """Uninitialised stats [8, n] and argmax ([n], or [0] if not wanted); the kernels write every number of both."""
    stats = torch.empty(NUM_STATS, n, dtype=torch.float32, device=like.device)
    return stats, torch.empty(n if want & ARGMAX.value else 0, dtype=torch.int64, device=like.device)


@triton.jit
def wide(x):
    """int64 of a tensor, of an argument that Triton specialised to the constant 1, or of the interpreter's Python int."""
    return tl.cast(x, tl.int64)


@triton.jit
def exp(x):
    """e^x as exp2: Triton lowers tl.exp to the ex2 that keeps denormals (a compare and two multiplies more an element)
    and tl.exp2 to the flushing one. What is flushed lies below e^-87 of the maximum."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def finite(m):
    """The reference point `ref` of a row: its max, or 0 where there is none."""
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def capped(z, cap):
    """cap * tanh(z / cap), by a polynomial near 0, where 1 - e^-2u would cancel. The interpreter has no libdevice."""
    u = z * (1.0 / cap)
    s = u * u
    small = ((((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s
             - 3.33332819422e-1) * s * u + u  # fmt: skip
    e = exp(-2.0 * tl.abs(u))
    large = (1.0 - e) / (1.0 + e)
    return cap * tl.where(tl.abs(u) < 0.625, small, tl.where(u < 0, -large, large))


@triton.jit
def read_targets(target, rows, keep, V, ignore_index):
    """(column or -1, ignored, out of range) of each row. Judged in int64: a wrapped index would be a wrong column."""
    if target is None:
        nothing = rows < 0
        return rows * 0 - 1, nothing, nothing
    else:
        y = tl.load(target + rows, mask=keep, other=-1)
        ignored = (y == ignore_index) & keep
        inside = (y >= 0) & (y < V) & (ignored == 0)
        column = tl.where(inside, y, -1).to(tl.int32)
        return column, ignored, keep & (inside == 0) & (ignored == 0)


@triton.jit
def absent_if_empty(logsum):
    """+inf for the log-sum of an empty rest: e^(z - ref - logsum) is then 0, as the contract has it."""
    return tl.where(logsum == NEG_INF, INF, logsum)


@triton.jit
def rest_terms(d, logsum, logsum_t, inverse_t, rest, rest_z, rest_t, WANT: tl.constexpr):
    """The terms of dz that every column but the target has; d = z - ref. On the target the caller overwrites them."""
    p = exp(d - logsum)
    if ENTROPY & WANT:
        g = p * (rest + rest_z * tl.maximum(d, -1e20))  # 0 * -inf would be NaN
    else:
        g = p * rest
    if TEMPERED & WANT:
        g += rest_t * exp(d * inverse_t - logsum_t)
    return g


@triton.jit
def shifted_squares(squares, plain, count, delta):
    """sum (x + delta)^2 from sum x^2, sum x and the count. An infinite sum stays one: inf - inf would be NaN."""
    return tl.where(squares == INF, squares, squares + (2.0 * plain + count * delta) * delta)


@triton.jit
def write_statistics(stats, rows, keep, N, column, ignored, bad, m, expsum, moment, picked, mass, weighted, squares, tempered,
                     WANT: tl.constexpr, SOFT: tl.constexpr):  # fmt: skip
    """Finish the sums of whole rows, all relative to `ref`, and store the table; returns (max, log-sum, target)."""
    ref = finite(m)
    logsum = tl.log(expsum)
    m = tl.where((expsum != expsum) & (m < INF), NAN, m)  # the running max does not see a NaN
    if not SOFT:
        picked = tl.where(column >= 0, picked, NEG_INF)
        picked = tl.where(bad, NAN, picked)
    out = stats + rows
    n = wide(N)
    tl.store(out, tl.where(ignored, 0.0, m), mask=keep)
    tl.store(out + n, tl.where(ignored, 0.0, logsum), mask=keep)
    tl.store(out + 2 * n, tl.where(ignored, 0.0, picked), mask=keep)
    mean = tl.where(ignored, 0.0, 0.0)
    total, square, warm = mean, mean, mean
    if ENTROPY & WANT:
        # (1 - p_y) E_rest + p_y (z_y - ref) with p_y = sigmoid(margin): no difference of large numbers.
        mean = tl.where(expsum == 0, 0.0, moment / expsum)
        if not SOFT:
            p = tl.where((column >= 0) & (picked != NEG_INF), 1.0 / (1.0 + exp(logsum - (picked - ref))), 0.0)
            mean = (1.0 - p) * mean + tl.where(p == 0, 0.0, p * (picked - ref))
            mean = tl.where(picked == INF, NAN, mean)
        mean = tl.where(ignored, 0.0, mean)
    if SUM & WANT:
        total = tl.where(ignored, 0.0, weighted)
    if SUMSQ & WANT:
        square = tl.where(ignored, 0.0, squares)
    if TEMPERED & WANT:
        warm = tl.where(ignored, 0.0, tl.log(tempered))
    tl.store(out + 3 * n, mean, mask=keep)
    tl.store(out + 4 * n, total, mask=keep)
    tl.store(out + 5 * n, square, mask=keep)
    tl.store(out + 6 * n, warm, mask=keep)
    tl.store(out + 7 * n, tl.where(ignored, 0.0, mass), mask=keep)
    return m, logsum, picked


@triton.jit(do_not_specialize=["N", "splits", "ignore_index"])
def merge_kernel(part, part_index, target, temperature, stats, argmax, N, V, splits, ignore_index, SOFT: tl.constexpr,
                 WANT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """[NUM_PARTS, splits, N] partial states -> stats and argmax. Order is fixed: reruns are bit-equal."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = rows < N
    column, ignored, bad = read_targets(target, rows, keep, V, ignore_index)
    n = wide(splits) * N
    m = tl.full([BLOCK], NEG_INF, tl.float32)
    for i in range(0, splits):
        m = tl.maximum(m, tl.load(part + wide(i) * N + rows, mask=keep, other=NEG_INF))
    ref = finite(m)
    expsum = tl.zeros([BLOCK], tl.float32)
    moment, picked, mass, weighted, squares, tempered = expsum, expsum, expsum, expsum, expsum, expsum
    best = tl.full([BLOCK], NEG_INF, tl.float32)
    best_index = tl.zeros([BLOCK], tl.int32)
    if TEMPERED & WANT:
        inverse_t = 1.0 / tl.load(temperature + rows, mask=keep, other=1.0)
    for i in range(0, splits):
        p = part + wide(i) * N + rows
        m_i = tl.load(p, mask=keep, other=NEG_INF)
        expsum_i = tl.load(p + P_SUM * n, mask=keep, other=0.0)
        shrink = exp(m_i - ref)
        expsum += expsum_i * shrink
        if ENTROPY & WANT:
            moment += shrink * (tl.load(p + P_MOMENT * n, mask=keep, other=0.0) + (finite(m_i) - ref) * expsum_i)
        if TEMPERED & WANT:
            tempered += tl.load(p + P_TEMPERED * n, mask=keep, other=0.0) * exp((m_i - ref) * inverse_t)
        delta = tl.load(p + P_BASE * n, mask=keep, other=0.0) - ref
        if SUM & WANT:
            weight = tl.load(p + P_WEIGHT * n, mask=keep, other=0.0)
            weighted += tl.load(p + P_WEIGHTED * n, mask=keep, other=0.0) + weight * delta
        if SUMSQ & WANT:
            squares_i = tl.load(p + P_SQUARES * n, mask=keep, other=0.0)
            plain = tl.load(p + P_PLAIN * n, mask=keep, other=0.0)
            squares += shifted_squares(squares_i, plain, tl.load(p + P_COUNT * n, mask=keep, other=0.0), delta)
        picked_i = tl.load(p + P_TARGET * n, mask=keep, other=0.0)
        if SOFT:
            mass_i = tl.load(p + P_MASS * n, mask=keep, other=0.0)
            picked += picked_i + mass_i * delta
            mass += mass_i
        else:
            picked += picked_i
        if ARGMAX & WANT:
            best_i = tl.load(p + P_BEST * n, mask=keep, other=NEG_INF)
            better = best_i > best  # strict, and splits in order: the lowest column wins a tie
            best = tl.where(better, best_i, best)
            best_index = tl.where(better, tl.load(part_index + wide(i) * N + rows, mask=keep, other=0), best_index)
    write_statistics(stats, rows, keep, N, column, ignored, bad, m, expsum, moment, picked, mass, weighted, squares, tempered,
                     WANT, SOFT)  # fmt: skip
    if ARGMAX & WANT:
        tl.store(argmax + rows, tl.where(ignored, -1, best_index).to(tl.int64), mask=keep)


def merge(part: Tensor, part_index: Tensor, target: Tensor | None, temperature: Tensor | None, stats: Tensor, argmax: Tensor,
          v: int, ignore_index: int, soft: bool, want: int) -> None:  # fmt: skip
    """Launch `merge_kernel` over part [NUM_PARTS, splits, n]."""
    _, splits, n = part.shape
    grid = (triton.cdiv(n, 128),)
    merge_kernel[grid](
        part, part_index, target, temperature, stats, argmax, n, v, splits, ignore_index, SOFT=soft, WANT=want, BLOCK=128
    )  # fmt: skip
