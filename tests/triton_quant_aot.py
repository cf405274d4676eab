"""The Triton kernels of the bit ops as their launchers launch them, for GPUs that are not there (triton_aot.py measures them).

The launchers run on tensors without memory, and what they would launch is written down: nothing about a launch is said twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from fastloss.triton_kernels import (
    binarize,
    fake_quant,
    hash_attention,
    lowbit_matmul,
    pack_bits,
    quantize_groups,
    unpack_bits,
)
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastloss.quant.contract import row_bytes
from triton_aot import CAPABILITY, Cost, measure

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
ROWS, COLUMNS = 2048, 4096


class QuantCase(NamedTuple):
    """One call of a launcher."""

    name: str
    dtype: str
    target: str

    def __str__(self) -> str:
        return "-".join(self).replace(" ", "_")


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _bits(rows: int, planes: int = 1) -> Tensor:
    return _new(planes, rows, row_bytes(COLUMNS), dtype=torch.uint8)


def _pack(dtype: torch.dtype, kind: int, planes: int, scale: Tensor | None = None, group: int = 0) -> None:
    pack_bits.pack_bits(_new(ROWS, COLUMNS, dtype=dtype), kind, None, scale, group, -3, planes, row_bytes(COLUMNS))


def _unpack(dtype: torch.dtype, planes: int, group: int) -> None:
    scale = _new(ROWS, COLUMNS // group if group else 1)
    unpack_bits.unpack_bits(_bits(ROWS, planes), COLUMNS, [1, 2, 4, 8][:planes], -3, scale, group, dtype)


def _binarize(dtype: torch.dtype, surrogate: int, save: int, groups: int, inner: int) -> None:
    x, shift, scale = _new(ROWS, COLUMNS, dtype=dtype), _new(1), _new(groups)
    binarize.binarize(x, shift, scale, groups, inner, surrogate, 1.0, 2.0, save, row_bytes(COLUMNS), 1.0)


def _binarize_backward(dtype: torch.dtype, surrogate: int, saved: str, groups: int, inner: int) -> None:
    x, scale = _new(ROWS, COLUMNS, dtype=dtype), _new(groups)
    bits, codes = _bits(ROWS)[0], _new(ROWS, COLUMNS, dtype=torch.uint8)
    given = {"x": (x, None, None, None), "mask": (None, bits, bits, None), "codes": (None, bits, None, codes)}[saved]
    binarize.binarize_backward(x, *given, None, scale, groups, inner, surrogate, 1.0, 2.0, 7, row_bytes(COLUMNS), 1.0)


def _fake_quant(dtype: torch.dtype, backward: bool, groups: int, inner: int, rounded: bool = False) -> None:
    x, scale = _new(ROWS, COLUMNS, dtype=dtype), _new(groups)
    zero_point = scale if rounded else None
    levels = (-4.0, 3.0, 1.0, 0.0, rounded) if inner else (-0.99, 0.99, 4.0, 0.5, rounded)
    if backward:
        fake_quant.fake_quant_backward(x, x, scale, None, zero_point, groups, inner, *levels, 7)
    else:
        fake_quant.fake_quant(x, scale, None, zero_point, groups, inner, *levels)


def _codec(dtype: torch.dtype, group: int, bits: int, stochastic: bool) -> None:
    n = ROWS * COLUMNS
    count = -(-n // group)
    seed = _new(1, dtype=torch.int64) if stochastic else None
    quantize_groups.quantize_groups(_new(n, dtype=dtype), group, bits, None, None, seed)
    codes = _new(count, group * bits // 8, dtype=torch.uint8)
    quantize_groups.dequantize_groups(codes, _new(count), _new(count), n, group, bits, dtype)


def _lowbit(
    dtype: torch.dtype, rows: int, weights: tuple[int, ...], group: int = 0, transposed: bool = False, n: int = 2048
) -> None:
    integer = dtype == torch.int8
    x = _new(rows, n if transposed else COLUMNS, dtype=dtype)
    scale = _new(n, COLUMNS // group if group else 1)
    out = torch.bfloat16 if integer else dtype
    x_scale = _new(rows) if integer else None
    lowbit_matmul.lowbit_matmul(
        x, _bits(n, len(weights)), COLUMNS, weights, -1, scale, group, transposed, x_scale, None, out
    )


def _hash(dtype: torch.dtype, causal: bool, own: bool, bits: int = 16) -> None:
    q, v = _new(32, 4096, bits, dtype=dtype), _new(32, 4096, 64, dtype=dtype)
    out, d = hash_attention.hash_attention(q, q, v, own, causal)
    hash_attention.hash_attention_backward(out, q, q, v, out, d, own, causal, 7)


CALLS: dict[str, Callable[[torch.dtype], None]] = {
    "pack signs": lambda t: _pack(t, 0, 1),
    "pack ternary": lambda t: _pack(t, 1, 2, _new(ROWS, 1)),
    "pack codes": lambda t: _pack(t, 2, 4, _new(ROWS, COLUMNS // 128), 128),
    "unpack 1": lambda t: _unpack(t, 1, 0),
    "unpack 4 groups": lambda t: _unpack(t, 4, 64),
    "binarize clip": lambda t: _binarize(t, 1, 7, ROWS, COLUMNS),
    "binarize codes each": lambda t: _binarize(t, 3, 15, ROWS * 4, COLUMNS // 4),
    "binarize biper columns": lambda t: _binarize(t, 4, 3, COLUMNS, 1),
    "gradient mask": lambda t: _binarize_backward(t, 1, "mask", ROWS, COLUMNS),
    "gradient reste": lambda t: _binarize_backward(t, 3, "x", 1, 1),
    "gradient biper columns": lambda t: _binarize_backward(t, 4, "x", COLUMNS, 1),
    "gradient swish codes": lambda t: _binarize_backward(t, 5, "codes", COLUMNS, 1),
    "gradient fda each": lambda t: _binarize_backward(t, 6, "x", ROWS * 4, COLUMNS // 4),
    "fake_quant tensor": lambda t: _fake_quant(t, False, 1, 0),
    "fake_quant rows": lambda t: _fake_quant(t, False, ROWS, COLUMNS, True),
    "fake_quant gradient tensor": lambda t: _fake_quant(t, True, 1, 0),
    "fake_quant gradient rows": lambda t: _fake_quant(t, True, ROWS, COLUMNS, True),
    "fake_quant gradient groups": lambda t: _fake_quant(t, True, ROWS * 64, COLUMNS // 64),
    "fake_quant gradient columns": lambda t: _fake_quant(t, True, COLUMNS, 1),
    "codec 8 bits": lambda t: _codec(t, 256, 8, False),
    "codec 4 bits stochastic": lambda t: _codec(t, 128, 4, True),
    "codec short groups": lambda t: _codec(t, 10, 8, True),
    "codec long groups": lambda t: _codec(t, 8192, 8, True),
    "hash_attention": lambda t: _hash(t, False, False),
    "hash_attention causal": lambda t: _hash(t, True, False),
    "hash_attention own long codes": lambda t: _hash(t, True, True, 256),
    "lowbit large": lambda t: _lowbit(t, 2048, (2,)),
    "lowbit ternary groups": lambda t: _lowbit(t, 2048, (-1, 2), 128),
    "lowbit codes medium": lambda t: _lowbit(t, 64, (1, 2, 4, 8), 64),
    "lowbit one row": lambda t: _lowbit(t, 1, (2,)),
    "lowbit one row of groups": lambda t: _lowbit(t, 1, (1, 2, 4, 8), 64),
    "lowbit transposed": lambda t: _lowbit(t, 2048, (2,), 0, True),
    "lowbit transposed groups": lambda t: _lowbit(t, 2048, (1, 2, 4, 8), 64, True),
    "lowbit transposed row": lambda t: _lowbit(t, 1, (-1, 2), 0, True),
    "lowbit transposed one scale": lambda t: _lowbit(t, 2048, (2,), 0, True, 1),
}


def _source(kernel: Any, given: dict[str, Any]) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        known = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (known and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if known and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def launches(case: QuantCase) -> list[tuple[str, ASTSource, dict[str, Any]]]:
    """(kernel's name, what is compiled, options) of every launch of the case."""
    made = []

    def write_down(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        made.append((self.fn.__name__, _source(self, given), {k: v for k, v in kwargs.items() if k in OPTIONS}))

    here = mock.patch.object(lowbit_matmul, "capability_of", lambda x: CAPABILITY[case.target])
    with here, mock.patch.object(JITFunction, "run", write_down):
        CALLS[case.name](DTYPES[case.dtype])
    return made


def compile_quant_case(case: QuantCase) -> dict[str, Cost]:
    """Build every kernel that the case launches, and take the machine code apart; of several launches, what spills most."""
    costs: dict[str, Cost] = {}
    for name, code, options in launches(case):
        cost = measure(code, case.target, options)
        if name not in costs or cost.spilled > costs[name].spilled:
            costs[name] = cost
    return costs
