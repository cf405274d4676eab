"""Kernels of lowbit_matmul: bits become integers in registers, matrix units multiply them (docs/design.md, "The bit contract").

An integer of at most 127 is exact in bfloat16, float16 and int8, so a product with a 16-bit number is exact in fp32. A float32
operand (or one that has been scaled) is split into bfloat16 pieces, two or three of them: exact again, at a third of the speed of
bfloat16 where TF32 would lose 13 bits and plain fp32 runs at a fifteenth.
"""

import triton
import triton.language as tl

from .common import INF, wide


@triton.jit
def weight_tile(words, r, column, R, row_words, WEIGHTS: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """offset + sum of weighted bits of the rows r, [ROWS, COLUMNS] from `column` on, in DTYPE. Made by selects and sums: no
    conversion of an integer, which runs at a quarter of their rate. Beyond the last word all bits are 0."""
    at = column // 32 + tl.arange(0, COLUMNS // 32)
    here = r[:, None] * row_words + at[None, :]
    place = tl.arange(0, 32)[None, None, :]
    for p in tl.static_range(len(WEIGHTS)):
        word = tl.load(words + wide(p) * R * row_words + here, mask=(at < row_words)[None, :], other=0)
        on = (word[:, :, None] >> place & 1) != 0
        if p == 0:
            value = tl.where(on, tl.full([1, 1, 1], OFFSET + WEIGHTS[p], DTYPE), tl.full([1, 1, 1], OFFSET, DTYPE))
        else:
            value += tl.where(on, tl.full([1, 1, 1], WEIGHTS[p], DTYPE), tl.full([1, 1, 1], 0, DTYPE))
    return tl.reshape(value, [ROWS, COLUMNS])


@triton.jit
def rows_tile(x, row, column, M, K, stride_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """x [ROWS, COLUMNS], 0 beyond column K. Rows are clamped, not masked, and offsets in a tile are 32 bits: 64-bit pointers and
    a predicate for each element would cost the registers. EVEN: no block of columns is cut off."""
    k = tl.arange(0, COLUMNS)
    at = (
        x
        + wide(row) * stride_x
        + column
        + (tl.minimum(tl.arange(0, ROWS), M - 1 - row)[:, None] * stride_x + k[None, :])
    )
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(k < K - column)[None, :], other=0)


@triton.jit
def leading(x):
    """The upper 16 bits of an fp32 number: a bfloat16. A NaN stays one."""
    return tl.where(x == x, (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True), x)


@triton.jit
def product(a, w, acc, PIECES: tl.constexpr, DTYPE: tl.constexpr):
    """acc + a @ w; w has DTYPE, and so have the pieces of a."""
    if PIECES == 1:
        if DTYPE == tl.int8:
            return tl.dot(a, w, acc, out_dtype=tl.int32)
        else:
            return tl.dot(a.to(DTYPE), w, acc, input_precision="ieee")
    else:
        rest = a.to(tl.float32)
        for _ in tl.static_range(PIECES - 1):
            piece = leading(rest)
            acc = tl.dot(piece.to(DTYPE), w, acc, input_precision="ieee")
            rest = tl.where(tl.abs(piece) < INF, rest - piece, 0.0)
        return tl.dot(rest.to(DTYPE), w, acc, input_precision="ieee")


@triton.jit
def finish(value, m, n, keep, scale, x_scale, bias, scale_row, N):
    """((value x_scale) scale) + bias, each step in fp32; scale only if it is one number for a whole row of weights."""
    value = value.to(tl.float32)
    if x_scale is not None:
        value *= tl.load(x_scale + m, mask=keep, other=0.0)
    if scale is not None:
        value *= tl.load(scale + n * scale_row, mask=n < N, other=0.0)
    if bias is not None:
        value += tl.load(bias + n, mask=n < N, other=0.0)
    return value


@triton.jit(do_not_specialize=["M", "R", "steps"])
def lowbit_matmul_kernel(
    x, words, scale, x_scale, bias, y, M, R, K, row_words, steps, stride_x, scale_row, WEIGHTS: tl.constexpr,
    OFFSET: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    PIECES: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [M, R] = x [M, K] W^T. SPLIT: program (tile, s) sums `steps` blocks of columns only, and stores [splits, M, R].
    Consecutive programs share rows of x: of the two operands it is the large one."""
    blocks = tl.cdiv(R, BN)
    row = tl.program_id(0) // blocks * BM
    first = tl.program_id(0) % blocks * BN
    m, n = row + tl.arange(0, BM), first + tl.arange(0, BN)
    r = wide(tl.minimum(n, R - 1))
    INTEGER: tl.constexpr = DTYPE == tl.int8
    acc = tl.zeros([BM, BN], tl.int32 if INTEGER else tl.float32)
    total = tl.zeros([BM, BN], tl.float32)
    begin = tl.program_id(1) * steps * BK
    for column in range(begin, tl.minimum(K, begin + steps * BK), BK):
        w = tl.trans(weight_tile(words, r, column, R, row_words, WEIGHTS, OFFSET, BN, BK, DTYPE))
        if TMA:
            a = x.load([row, column])
        else:
            a = rows_tile(x, row, column, M, K, stride_x, BM, BK, EVEN)
        acc = product(a, w, acc, PIECES, DTYPE)
        if GROUP != 0:
            if (column + BK) % GROUP == 0 or column + BK >= K:
                value = acc.to(tl.float32)
                if x_scale is not None:
                    value *= tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
                total += value * tl.load(scale + r * scale_row + column // GROUP)[None, :]
                acc = tl.zeros_like(acc)
    out = y + (wide(tl.program_id(1)) * M + m)[:, None] * R + n[None, :]
    keep = (m < M)[:, None] & (n < R)[None, :]
    found = acc
    if GROUP != 0:
        found = total
    if SPLIT:
        tl.store(out, found, mask=keep)
    else:
        if GROUP != 0:
            found = finish(found, m[:, None], n[None, :], (m < M)[:, None], None, None, bias, 0, R)
        else:
            found = finish(found, m[:, None], n[None, :], (m < M)[:, None], scale, x_scale, bias, scale_row, R)
        tl.store(out, found.to(y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["M", "R", "steps"])
def lowbit_matmul_transposed_kernel(
    x, words, scale, y, M, R, K, row_words, steps, stride_x, scale_row, WEIGHTS: tl.constexpr, OFFSET: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, OF_ROWS: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    PIECES: tl.constexpr, DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [M, K] = (x [M, R] scale) W; a tile of columns lies in one group. OF_ROWS: each row of W has scales of its own."""
    blocks = tl.cdiv(K, BN)
    row = tl.program_id(0) // blocks * BM
    column = tl.program_id(0) % blocks * BN
    m, n = row + tl.arange(0, BM), column + tl.arange(0, BN)
    group = 0
    if GROUP != 0:
        group = column // GROUP
    acc = tl.zeros([BM, BN], tl.float32)
    begin = tl.program_id(1) * steps * BK
    for first in range(begin, tl.minimum(R, begin + steps * BK), BK):
        k = first + tl.arange(0, BK)
        r = wide(tl.minimum(k, R - 1))
        w = weight_tile(words, r, column, R, row_words, WEIGHTS, OFFSET, BK, BN, DTYPE)
        if TMA:
            a = x.load([row, first])
        else:
            a = rows_tile(x, row, first, M, R, stride_x, BM, BK, EVEN)
        if OF_ROWS:
            a = a.to(tl.float32) * tl.load(scale + r * scale_row + group)[None, :]
        acc = product(a, w, acc, PIECES, DTYPE)
    if scale is not None:
        if not OF_ROWS:
            acc *= tl.load(scale + group)
    out = y + (wide(tl.program_id(1)) * M + m)[:, None] * K + n[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < K)[None, :])


@triton.jit(do_not_specialize=["M", "N", "splits"])
def lowbit_merge_kernel(partial, scale, x_scale, bias, y, M, N, splits, scale_row, BLOCK: tl.constexpr):
    """The sums of all splits, in their order, scaled. partial [splits, M, N]."""
    at = wide(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    size = wide(M) * N
    keep = at < size
    value = tl.load(partial + at, mask=keep, other=0)
    for i in range(1, splits):
        value += tl.load(partial + i * size + at, mask=keep, other=0)
    value = finish(value, at // N, at % N, keep, scale, x_scale, bias, scale_row, N)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=keep)
