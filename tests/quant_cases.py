"""Calls of the bit ops that every kernel of them must get right: shapes that fit no tile, every kind, layouts of parameters,
NaN, infinities and zeros of both signs. Each case is (arguments of the op, how it is compared with the reference).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss.quant.contract import Grad, Pack, Save, Surrogate

OPS = torch.ops.fastloss
#: Rows and columns: one number, less than a byte, a part of 512 bits, more; nothing at all.
SHAPES = ((1, 1), (3, 7), (5, 130), (2, 1030), (0, 5), (4, 0))
#: Kind, planes, lowest code; then weights and offset of what is packed.
KINDS = {
    "binary": (Pack.SIGN, 1, 0, [2], -1),
    "ternary": (Pack.TERNARY, 2, 0, [-1, 2], 0),
    "codes of 3 bits": (Pack.CODES, 3, -4, [1, 2, 4], -4),
    "codes of 4 bits": (Pack.CODES, 4, 0, [1, 2, 4, 8], 0),
    "odd levels": (Pack.CODES, 2, 0, [2, 4], -3),
}
#: p0 and p1 of each surrogate.
PARAMETERS = {
    Surrogate.IDENTITY: (0.0, 0.0), Surrogate.CLIP: (1.2, 0.0), Surrogate.APPROX: (0.0, 0.0), Surrogate.RESTE: (1.7, 1.3),
    Surrogate.BIPER: (2.0, 0.0), Surrogate.SWISH: (5.0, 0.0), Surrogate.FDA: (2.5, 3.0),
}  # fmt: skip
#: (low, high, steps, shift, rounded): LSQ, SEQ, SEQ's ternary, affine.
LEVELS = (
    (-4.0, 3.0, 1.0, 0.0, False),
    (-0.99, 0.99, 4.0, 0.5, False),
    (-0.99, 0.99, 1.5, 0.0, False),
    (0.0, 15.0, 1.0, 0.0, True),
)

Case = tuple[str, tuple[Any, ...]]


def numbers(rows: int, columns: int, dtype: torch.dtype = torch.float32, hard: bool = True) -> Tensor:
    """Random numbers; `hard`: some are 0, -0, NaN or infinite. Rows lie apart: no kernel may take them for contiguous."""
    x = torch.randn(rows, columns + 3, generator=torch.Generator().manual_seed(rows * 31 + columns)).to(dtype)[
        :, :columns
    ]
    if hard and x.numel():
        special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")], dtype=dtype)
        at = torch.linspace(0, x.numel() - 1, 5).long()
        x[at // columns, at % columns] = special
    return x


def uniform(*shape: int, low: float = 0.1) -> Tensor:
    return low + torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def layouts(rows: int, columns: int) -> list[tuple[int, int]]:
    """(groups, inner): one for all, of rows, of columns, and where there are enough elements, of other pieces."""
    made = [(1, 1), (rows, columns), (columns, 1)] if rows and columns else [(1, 1)]
    if columns == 130:
        made += [(10, 13), (rows * 5, 26), (2, 65), (rows * 10, 13)]
    return made


def pack_cases(dtype: torch.dtype) -> Iterator[Case]:
    for rows, columns in SHAPES:
        x = numbers(rows, columns, dtype)
        for kind, planes, low, _, _ in KINDS.values():
            yield "pack_bits", (x, int(kind), None, None, 0, low, planes)
            group = 64 if columns else 0
            groups = -(-columns // 64) if group else 1
            center, scale = uniform(1, groups, low=-0.5), uniform(rows, groups)
            yield "pack_bits", (x, int(kind), center, scale, group, low, planes)


def packed(rows: int, columns: int, name: str) -> Tensor:
    kind, planes, low, _, _ = KINDS[name]
    with fastloss.use_backend("reference"):
        return OPS.pack_bits(3 * numbers(rows, columns, hard=False), int(kind), None, None, 0, low, planes)[0]


def unpack_cases(dtype: torch.dtype) -> Iterator[Case]:
    for (rows, columns), name in zip(SHAPES, [*KINDS, "binary"], strict=True):
        planes, weights, offset = packed(rows, columns, name), KINDS[name][3], KINDS[name][4]
        yield "unpack_bits", (planes, columns, weights, offset, None, 0, dtype)
        if columns:
            scale = uniform(rows, -(-columns // 64))
            yield "unpack_bits", (planes, columns, weights, offset, scale, 64, dtype)


def binarize_cases(dtype: torch.dtype) -> Iterator[Case]:
    for rows, columns in SHAPES:
        x = numbers(rows, columns, dtype)
        for i, (surrogate, (p0, p1)) in enumerate(PARAMETERS.items()):
            made = layouts(rows, columns)
            groups, inner = made[i % len(made)]
            bounded = surrogate not in (Surrogate.IDENTITY, Surrogate.BIPER)
            save = Save.DENSE | Save.SIGNS | Save.MASK | (Save.CODES if bounded else 0)
            shift, scale = uniform(1, low=-0.5), uniform(groups)
            yield "binarize", (x, shift, scale, groups, inner, int(surrogate), p0, p1, int(save))
            yield "binarize", (x, None, None, 1, 1, int(surrogate), p0, p1, int(Save.SIGNS))


def gradient_cases(dtype: torch.dtype) -> Iterator[Case]:
    needs = int(Grad.X | Grad.SCALE | Grad.SHIFT)
    for rows, columns in SHAPES[:4]:
        # infinities have no sum to compare; a grad that is one has no gradient
        x, grad = numbers(rows, columns, dtype, hard=False), numbers(rows, columns, dtype, hard=False).flip(0)
        for surrogate, (p0, p1) in PARAMETERS.items():
            for groups, inner in layouts(rows, columns)[int(surrogate) % 2 :: 2]:
                shift, scale, rest = uniform(groups, low=-0.5), uniform(groups), (int(surrogate), p0, p1, needs)
                yield "binarize_backward", (grad, x, None, None, None, shift, scale, groups, inner, *rest)
                bounded = surrogate not in (Surrogate.IDENTITY, Surrogate.BIPER)
                save = int(Save.SIGNS | Save.MASK | (Save.CODES if bounded else 0))
                with fastloss.use_backend("reference"):
                    _, signs, _, mask, codes = OPS.binarize(x, shift, scale, groups, inner, *rest[:3], save)
                if bounded:
                    yield "binarize_backward", (grad, None, signs, None, codes, None, scale, groups, inner, *rest)
                if surrogate == Surrogate.CLIP:
                    yield "binarize_backward", (grad, None, signs, mask, None, None, scale, groups, inner, *rest)


def fake_quant_cases(dtype: torch.dtype) -> Iterator[Case]:
    needs = int(Grad.X | Grad.SCALE | Grad.SHIFT)
    for rows, columns in SHAPES:
        for i, (groups, inner) in enumerate(layouts(rows, columns)):
            levels = LEVELS[i % len(LEVELS)]
            zero_point = torch.arange(groups).float() % 5 - 2 if levels[-1] else None
            offset = uniform(1, low=-0.5) if i % 2 else None
            given = (uniform(groups), offset, zero_point, groups, inner, *levels)
            yield "fake_quant", (numbers(rows, columns, dtype), *given)
            x, grad = numbers(rows, columns, dtype, hard=False), numbers(rows, columns, dtype, hard=False).flip(0)
            yield "fake_quant_backward", (grad, x, *given, needs)


def codec_cases(dtype: torch.dtype) -> Iterator[Case]:
    seed = torch.tensor([-77])
    for n, group, bits in ((1, 64, 8), (1000, 64, 4), (1000, 10, 8), (9001, 5000, 8), (0, 64, 8)):
        x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        if n == 1000:
            x[3], x[200], x[300], x[640:704] = float("nan"), float("inf"), -float("inf"), 1.5  # a group of one value
        for low, high in ((None, None), (-uniform(3), uniform(3))):
            for rounding in (None, seed):
                yield "quantize_groups", (x, group, bits, low, high, rounding)
                with fastloss.use_backend("reference"):
                    made = OPS.quantize_groups(x, group, bits, low, high, rounding)
            yield "dequantize_groups", (*made, n, group, bits, dtype)


def lowbit_cases(dtype: torch.dtype, rows: tuple[int, ...] = (1, 20, 70)) -> Iterator[Case]:
    """dtype int8: rows of int8 with scales, result float32."""
    integer = dtype == torch.int8
    for m, (name, (_, _, _, weights, offset)) in ((m, kind) for m in rows for kind in KINDS.items()):
        n, columns = (33, 200) if name == "ternary" else (5, 70)
        planes = packed(n, columns, name)
        for transposed in (False,) if integer else (False, True):
            depth = n if transposed else columns
            x = 50 * numbers(m, depth, hard=False) if integer else numbers(m, depth, hard=False)
            x = x.clamp(-128, 127).to(dtype)
            x_scale = uniform(m) if integer else None
            out, bias = torch.float32 if integer else dtype, None if transposed else uniform(n)
            for scale, group in (
                (None, 0),
                (uniform(n, 1), 0),
                (uniform(n, -(-columns // 64)), 64),
                (uniform(1, 1), 0),
            ):
                yield (
                    "lowbit_matmul",
                    (x, planes, columns, weights, offset, scale, group, transposed, x_scale, bias, out),
                )


CASES: dict[str, Callable[[torch.dtype], Iterator[Case]]] = {
    "pack_bits": pack_cases, "unpack_bits": unpack_cases, "binarize": binarize_cases, "binarize_backward": gradient_cases,
    "fake_quant": fake_quant_cases, "groups": codec_cases, "lowbit_matmul": lowbit_cases,
}  # fmt: skip


def run(backend: str, op: str, args: tuple[Any, ...], device: str = "cpu") -> tuple[Tensor, ...]:
    """The results of an op on the backend, brought back."""
    there = tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
    with fastloss.use_backend(backend):
        got = fastloss.registry.run(op, *there)
    return tuple(t.cpu() for t in ((got,) if isinstance(got, Tensor) else got))


def check(backend: str, op: str, args: tuple[Any, ...], device: str = "cpu") -> None:
    """Bits, codes and dense results are those of the reference; sums and products are as close as fp32 and their dtype allow."""
    got, wanted = run(backend, op, args, device), run("reference", op, args)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, (
            f"{op}, result {i}: {a.dtype} {a.shape}, not {b.dtype} {b.shape}"
        )
        exact = op not in ("binarize_backward", "lowbit_matmul") and not (op == "fake_quant_backward" and i)
        if exact:
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan()), (
                f"{op}, result {i}"
            )
        elif i and b.numel():  # a sum: as close as its terms allow
            size = 1.0 + args[0].double().abs().sum()
            apart = (a.double() - b.double()).abs().max() / size
            assert apart <= 5e-7, f"{op}, result {i}: {float(apart):.3g} apart of {float(size):.3g}"
        elif b.numel():
            size = 1.0 + b.double().abs().max()
            apart = (a.double() - b.double()).abs().max() / size
            assert apart <= 4 * torch.finfo(b.dtype).eps + 1e-6, (
                f"{op}, result {i}: {float(apart):.3g} apart of {float(size):.3g}"
            )
