"""What tests/test_gpu_quant.py checks on a GPU, for tensors of any device: tests/triton runs it in the interpreter.

Every bit op through torch.ops, the reference the oracle: bits and whole numbers are equal, floats up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastloss
from bit_cases import KINDS, Rows, random_rows
from fastloss.quant import selftest
from fastloss.quant.contract import Activation, Grad, Pack, Save, Surrogate

OPS = torch.ops.fastloss
#: (M, N, K): less than a tile, no multiple of one, several of them, a K of many steps.
SHAPES = ((1, 1, 1), (5, 77, 33), (70, 66, 513), (300, 257, 1100))
Arguments = tuple[Any, ...]


def to(device: str, arguments: Arguments) -> Arguments:
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in arguments)


def operands(m: int, n: int, k: int, a: str = "binary", b: str = "binary") -> Arguments:
    """The nine arguments that every product begins with."""
    p, q = random_rows(m, k, KINDS[a]), random_rows(n, k, KINDS[b])

    def parts(rows: Rows) -> tuple[Tensor, Tensor]:
        return rows.planes, rows.popcounts

    return (*parts(p), *parts(q), k, list(p.kind.weights), p.kind.offset, list(q.kind.weights), q.kind.offset)


def epilogue(m: int, n: int, activation: int = Activation.NONE) -> Arguments:
    bias = torch.randn(n)
    bias[0] = torch.nan
    return torch.randn(m), torch.randn(n), bias, int(activation)


def same(name: str, got: Any, want: Any, tolerance: float = 0.0) -> None:
    """Whole numbers and NaN as they are; floats within `tolerance` of the largest of their tensor."""
    for a, b in zip(*((r,) if isinstance(r, Tensor) else r for r in (got, want)), strict=True):
        assert a.shape == b.shape and (a.dtype == b.dtype or a.dtype.is_floating_point), f"{name}: {a.dtype} {a.shape}"
        if not a.is_floating_point() or tolerance == 0:
            assert torch.equal(torch.nan_to_num(a, 3e4), torch.nan_to_num(b, 3e4)), name
            continue
        finite = b[b.isfinite()].abs()
        slack = tolerance * float(finite.max() if finite.numel() else 0)
        torch.testing.assert_close(
            a, b.to(a.dtype), rtol=tolerance, atol=slack, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )


def check(backend: str, op: str, arguments: Arguments, device: str, tolerance: float = 0.0) -> Any:
    """The op on `backend` as on the reference, which has the same tensors; what was given is as it was."""
    given = to(device, arguments)
    with fastloss.use_backend("reference"):
        want = getattr(OPS, op)(*given)
    with fastloss.use_backend(backend):
        got = getattr(OPS, op)(*given)
    same(op, got, want, tolerance)
    for before, after in zip(arguments, given, strict=True):
        if isinstance(before, Tensor):
            same(f"{op}: its arguments", after.cpu(), before)
    return got


# ------------------------------------------------------------------------------------------------------ products of bits


def check_bgemm(backend: str, device: str, shape: tuple[int, int, int], a: str = "binary", b: str = "binary") -> None:
    """The sums, every dtype with an epilogue, and signs."""
    m, n, _ = shape
    product = operands(*shape, a, b)
    check(backend, "bgemm", (*product, None, None, None, 0, torch.int32), device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for activation in Activation:
            tolerance = 2 * torch.finfo(dtype).eps if activation == Activation.SILU else 0.0
            check(backend, "bgemm", (*product, *epilogue(m, n, activation), dtype), device, tolerance)
    check(backend, "bgemm", (*product, None, torch.randn(n), None, 0, torch.float16), device)
    for activation in (Activation.NONE, Activation.RELU, Activation.HARDTANH):
        check(backend, "bgemm_signs", (*product, *epilogue(m, n, activation)), device)


def check_hamming_topk(
    backend: str, device: str, shape: tuple[int, int, int], a: str = "binary", b: str = "binary"
) -> None:
    """With many equal sums, whole and scaled; scales that are NaN, infinite and 0."""
    n = shape[1]
    product = operands(*shape, a, b)
    hard = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, 1.0, -1.0])[torch.randint(8, (n,))]
    for scale in (None, torch.randn(n), hard):
        for count in {1, min(n, 10), min(n, 77)}:
            check(backend, "hamming_topk", (*product, scale, count), device)


# ------------------------------------------------------------------------------------------------------------ the others


def numbers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random numbers with zeros of both signs, NaN and infinities, in memory with gaps."""
    x = torch.randn(rows, columns + 3)
    for value, where in ((0.0, 1), (-0.0, 2), (torch.nan, 5), (torch.inf, 7), (-torch.inf, 9)):
        x.view(-1)[where::61] = value
    return x.to(dtype)[:, 1 : columns + 1]


def pack_cases(rows: int, columns: int, dtype: torch.dtype) -> Iterator[Arguments]:
    x, groups = numbers(rows, columns, dtype), -(-columns // 64)
    for group, count in ((0, 1), (64, groups)):
        center, scale = torch.randn(rows, count), torch.rand(1, count) + 0.5
        yield x, int(Pack.SIGN), center, None, group, 0, 1
        yield x, int(Pack.TERNARY), None, scale, group, 0, 1
        yield x, int(Pack.CODES), center, scale, group, -4, 3
    yield x, int(Pack.SIGN), None, None, 0, 0, 1


def unpack_cases(rows: int, columns: int, dtype: torch.dtype) -> Iterator[Arguments]:
    for kind, group in (("binary", 0), ("ternary", 64), ("4 bits", 0)):
        made = random_rows(rows, columns, KINDS[kind])
        scale = torch.rand(rows, -(-columns // group) if group else 1) + 0.5
        yield made.planes, columns, list(made.kind.weights), made.kind.offset, scale, group, dtype


def lowbit_cases(rows: int, columns: int, dtype: torch.dtype) -> Iterator[Arguments]:
    m = 17
    for kind, group in (("binary", 0), ("ternary", 64), ("4 bits", 64)):
        w = random_rows(rows, columns, KINDS[kind])
        scale = torch.rand(rows, -(-columns // group) if group else 1) + 0.5
        head = w.planes, columns, list(w.kind.weights), w.kind.offset, scale, group
        yield torch.randn(m, columns).to(dtype), *head, False, None, torch.randn(rows), dtype
        yield torch.randn(m, rows).to(dtype), *head, True, None, None, dtype
        x = torch.randint(-127, 128, (m, columns), dtype=torch.int8)
        yield x, *head, False, torch.rand(m), None, dtype


#: p0 and p1 of each surrogate.
SURROGATES = {
    Surrogate.IDENTITY: (1.0, 0.0), Surrogate.CLIP: (1.0, 0.0), Surrogate.APPROX: (1.0, 0.0), Surrogate.RESTE: (3.0, 1.5),
    Surrogate.BIPER: (5.0, 0.0), Surrogate.SWISH: (5.0, 0.0), Surrogate.FDA: (0.3, 3.0),
}  # fmt: skip


def layouts(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(groups, inner): one for all, rows, columns."""
    yield from ((1, rows * columns), (rows, columns), (columns, 1))


def binarize_cases(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    """Forwards, and backwards of x, of a mask and of codes."""
    x, grad = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    needs, signs = int(sum(Grad)), Save.DENSE | Save.SIGNS
    for surrogate, p in SURROGATES.items():
        for groups, inner in layouts(rows, columns):
            shift, scale = torch.randn(groups) / 9, torch.rand(groups) + 0.5
            tail = groups, inner, int(surrogate), *p
            save = signs | (Save.MASK if surrogate == Surrogate.CLIP else Save.NOTHING)
            yield "binarize", (x, shift, scale, *tail, int(save))
            yield "binarize_backward", (grad, x, None, None, None, shift, scale, *tail, needs)
            if surrogate in (Surrogate.CLIP, Surrogate.RESTE, Surrogate.SWISH):
                with fastloss.use_backend("reference"):
                    save |= Save.CODES if surrogate != Surrogate.CLIP else Save.NOTHING
                    made = OPS.binarize(x, shift, scale, *tail, int(save))
                mask = made[3] if made[3].numel() else None
                codes = made[4] if made[4].numel() else None
                yield "binarize_backward", (grad, None, made[1], mask, codes, shift, scale, *tail, needs)


def fake_quant_cases(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    """LSQ, SEQ, and with offsets and zero points."""
    x, grad = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    for groups, inner in layouts(rows, columns):
        scale, offset = torch.rand(groups) / 4 + 0.1, torch.randn(groups) / 9
        zero = torch.randint(-2, 3, (groups,)).float()
        for more in (
            (scale, None, None, groups, inner, -8.0, 7.0, 1.0, 0.0, False),
            (scale * 8, None, None, groups, inner, -0.99, 0.99, 4.0, 0.5, False),
            (scale, offset, zero, groups, inner, 0.0, 15.0, 1.0, 0.0, True),
        ):
            yield "fake_quant", (x, *more)
            yield "fake_quant_backward", (grad, x, *more, int(sum(Grad)))


def group_cases(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    """Own ranges and given ones, nearest and stochastic, both sizes of codes."""
    x = torch.randn(rows * columns).to(dtype)
    low, high = torch.tensor([-1.0, -0.5]), torch.tensor([1.0, 2.0])
    for bits in (8, 4):
        for ranges in ((None, None), (low, high)):
            for seed in (None, torch.tensor([-5])):
                yield "quantize_groups", (x, 64, bits, *ranges, seed)
        with fastloss.use_backend("reference"):
            made = OPS.quantize_groups(x, 64, bits)
        yield "dequantize_groups", (*made, len(x), 64, bits, dtype)


def check_every_op(
    backend: Callable[[str], str | None], device: str, rows: int, columns: int, dtype: torch.dtype
) -> int:
    """All cases of the ops above on the backend that is named for each; returns how many ran."""
    eps = torch.finfo(dtype).eps
    cases: list[tuple[str, Arguments]] = [
        *(("pack_bits", c) for c in pack_cases(rows, columns, dtype)),
        *(("unpack_bits", c) for c in unpack_cases(rows, columns, dtype)),
        *(("lowbit_matmul", c) for c in lowbit_cases(rows, columns, dtype)),
        *binarize_cases(rows, columns, dtype),
        *fake_quant_cases(rows, columns, dtype),
        *group_cases(rows, columns, dtype),
        *((op, selftest.arguments(op, torch.randn(7, 100).to(dtype), torch.randn(9, 100).to(dtype))) for op in selftest.OPS),
    ]  # fmt: skip
    ran = 0
    for op, arguments in cases:
        if (name := backend(op)) is not None:
            check(name, op, arguments, device, 0.0 if op == "pack_bits" else max(2 * eps, 1e-5))
            ran += 1
    return ran
