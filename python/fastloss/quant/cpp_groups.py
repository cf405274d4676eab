"""The codec of saved activations of the `cpp` backend (csrc/cpu/quantize_groups.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend_cpp, kept_memory
from ..compiled import _C, DTYPES, pointer
from ..registry import kernel


def _why_not_shape(group: int, bits: int) -> str | None:
    if bits not in (4, 8) or group < 1 or group * bits % 8:
        return f"takes 8 bits, or 4 bits and an even group; got bits {bits}, group {group}"
    return None


def _why_not(
    x: Tensor, group: int, bits: int, low: Tensor | None, high: Tensor | None, seed: Tensor | None
) -> str | None:
    if missing := backend_cpp._missing(x):
        return missing
    if x.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16, got {x.dtype}"
    if (low is None) != (high is None) or (low is not None and high is not None and low.numel() != high.numel()):
        return "takes low and high of the same length, or neither"
    return _why_not_shape(group, bits)


@kernel("quantize_groups", "cpp", _why_not)
def quantize_groups(
    x: Tensor, group: int, bits: int, low: Tensor | None, high: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, low, step) of docs/design.md, "Groups of saved activations"."""
    x, n, count = x.contiguous(), x.shape[0], -(-x.shape[0] // group)
    low, high = (None if t is None else t.to(torch.float32).contiguous() for t in (low, high))
    codes = kept_memory.empty((count, group * bits // 8), torch.uint8)
    lows, steps = (torch.empty(count, dtype=torch.float32, device="cpu") for _ in range(2))
    fields = _C.QuantizeGroups(  # type: ignore[union-attr]
        x=pointer(x), low=pointer(low), high=pointer(high), seed=pointer(seed), codes=pointer(codes), lows=pointer(lows),
        steps=pointer(steps), n=n, group=group, channels=0 if low is None else low.numel(), bits=bits,
        dtype=DTYPES[x.dtype],
    )  # fmt: skip
    _C.quantize_groups_cpu(fields, backend_cpp.ISA)  # type: ignore[union-attr]
    return codes, lows, steps


def _why_not_back(
    codes: Tensor, low: Tensor, step: Tensor, n: int, group: int, bits: int, dtype: torch.dtype
) -> str | None:
    if missing := backend_cpp._missing(codes):
        return missing
    if dtype not in DTYPES:
        return f"makes float32, float16 and bfloat16, got {dtype}"
    if codes.numel() * 8 < n * bits or low.numel() * group < n or step.numel() != low.numel():
        return f"takes codes and ranges of all {n} elements, got {codes.numel()} bytes and {low.numel()} groups"
    return _why_not_shape(group, bits)


@kernel("dequantize_groups", "cpp", _why_not_back)
def dequantize_groups(
    codes: Tensor, low: Tensor, step: Tensor, n: int, group: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """x' = low + code step of docs/design.md, "Groups of saved activations"."""
    codes, low, step = codes.contiguous(), low.float().contiguous(), step.float().contiguous()
    x = kept_memory.empty((n,), dtype)
    fields = _C.DequantizeGroups(  # type: ignore[union-attr]
        codes=pointer(codes), lows=pointer(low), steps=pointer(step), x=pointer(x), n=n, group=group, bits=bits,
        dtype=DTYPES[dtype],
    )  # fmt: skip
    _C.dequantize_groups_cpu(fields, backend_cpp.ISA)  # type: ignore[union-attr]
    return x


#: The functions of csrc/cpu/saved_gradient.h by the names of saved_functions.py.
_FUNCTIONS = {"none": 0, "tanh": 1, "silu": 2, "softmax": 3}


def _why_not_gradient(
    grad: Tensor, codes: Tensor, low: Tensor, step: Tensor, group: int, bits: int, function: str, columns: int
) -> str | None:
    return backend_cpp._missing(grad) or _why_not_back(codes, low, step, grad.numel(), group, bits, grad.dtype)


@kernel("saved_gradient", "cpp", _why_not_gradient)
def saved_gradient(
    grad: Tensor, codes: Tensor, low: Tensor, step: Tensor, group: int, bits: int, function: str, columns: int
) -> Tensor:
    """grad f'(x'), or for a softmax over `columns` numbers y' (grad - sum grad y'), of saved codes, in one pass."""
    grad, codes, low, step = (t.contiguous() for t in (grad, codes, low, step))
    out = kept_memory.empty(grad.shape, grad.dtype)
    fields = _C.SavedGradient(  # type: ignore[union-attr]
        codes=pointer(codes), lows=pointer(low), steps=pointer(step), grad=pointer(grad), out=pointer(out), n=grad.numel(),
        group=group, columns=columns, bits=bits, function=_FUNCTIONS[function], dtype=DTYPES[grad.dtype],
    )  # fmt: skip
    _C.saved_gradient_cpu(fields, backend_cpp.ISA)  # type: ignore[union-attr]
    return out
