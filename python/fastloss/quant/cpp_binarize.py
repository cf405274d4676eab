"""`binarize` and its backward of the `cpp` backend (csrc/cpu/binarize.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend_cpp, kept_memory
from ..compiled import _C, DTYPES, pointer
from ..registry import kernel
from .contract import Grad, Save, Surrogate, row_bytes


def _why_not(x: Tensor) -> str | None:
    if missing := backend_cpp._missing(x):
        return missing
    return None if x.dtype in DTYPES else f"takes float32, float16 and bfloat16, got {x.dtype}"


def _parameter(name: str, values: Tensor | None, groups: int) -> Tensor | None:
    """1 or `groups` numbers as the kernel reads them; ValueError where there are others."""
    if values is None:
        return None
    if values.numel() not in (1, groups):
        raise ValueError(f"{name} must have 1 or {groups} numbers, got {list(values.shape)}")
    return values.to(torch.float32).contiguous()


def _fields(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, groups: int, inner: int, surrogate: int, p0: float, p1: float
) -> dict[str, object]:
    return dict(
        shift=(pointer(shift), 0 if shift is None else shift.numel()),
        scale=(pointer(scale), 0 if scale is None else scale.numel()),
        rows=x.shape[0], columns=x.shape[1], groups=groups, inner=max(inner, 1), dtype=DTYPES[x.dtype],
        surrogate=int(surrogate), p0=p0, p1=p1, isa=backend_cpp.ISA,
    )  # fmt: skip


def why_not_forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, groups: int, inner: int, surrogate: int, p0: float,
    p1: float, save: int,
) -> str | None:  # fmt: skip
    """Why the compiled kernel cannot take this, or None."""
    if save & Save.CODES and surrogate in (Surrogate.IDENTITY, Surrogate.BIPER):
        return "makes codes of a surrogate whose slope ends somewhere"
    return _why_not(x)


@kernel("binarize", "cpp", why_not_forward)
def binarize(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, groups: int, inner: int, surrogate: int, p0: float,
    p1: float, save: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """All that `save` asks for in one pass over x."""
    (rows, columns), x = x.shape, x.contiguous()
    shift, scale = _parameter("shift", shift, groups), _parameter("scale", scale, groups)
    width = row_bytes(columns)
    y = kept_memory.empty((rows, columns) if save & Save.DENSE else (0,), x.dtype)
    signs, mask, codes = (
        kept_memory.empty((rows, size) if save & what else (0,), torch.uint8)
        for what, size in ((Save.SIGNS, width), (Save.MASK, width), (Save.CODES, columns))
    )
    popcounts = torch.zeros(rows if save & Save.SIGNS else 0, dtype=torch.int32, device="cpu")
    _C.binarize_cpu(  # type: ignore[union-attr]
        **_fields(x, shift, scale, groups, inner, surrogate, p0, p1), x=pointer(x), y=pointer(y), signs=pointer(signs),
        popcounts=pointer(popcounts), mask=pointer(mask), codes=pointer(codes),
    )  # fmt: skip
    return y, signs, popcounts, mask, codes


def why_not_backward(
    grad: Tensor, x: Tensor | None, signs: Tensor | None, mask: Tensor | None, codes: Tensor | None, *args: object
) -> str | None:
    """Why the compiled kernel cannot take this, or None."""
    if x is not None and x.dtype != grad.dtype:
        return f"takes x and grad of one dtype, got {x.dtype} and {grad.dtype}"
    if codes is not None and args[4] in (Surrogate.IDENTITY, Surrogate.BIPER):
        return "takes codes of a surrogate whose slope ends somewhere"
    return _why_not(grad)


@kernel("binarize_backward", "cpp", why_not_backward)
def binarize_backward(
    grad: Tensor, x: Tensor | None, signs: Tensor | None, mask: Tensor | None, codes: Tensor | None,
    shift: Tensor | None, scale: Tensor | None, groups: int, inner: int, surrogate: int, p0: float, p1: float, needs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, scale and shift in one pass over grad and what was saved."""
    grad = grad.contiguous()
    x, signs, mask, codes = (None if t is None else t.contiguous() for t in (x, signs, mask, codes))
    rows, columns = grad.shape
    for name, saved, width in (
        ("x", x, columns), ("signs", signs, row_bytes(columns)), ("mask", mask, row_bytes(columns)), ("codes", codes, columns),
    ):  # fmt: skip
        if saved is not None and tuple(saved.shape) != (rows, width):
            raise ValueError(
                f"{name} of a gradient {list(grad.shape)} must be [{rows}, {width}], got {list(saved.shape)}"
            )
    slopes = surrogate == Surrogate.IDENTITY or any(t is not None for t in (x, mask, codes))
    if (needs & (Grad.X | Grad.SHIFT) and not slopes) or (needs & Grad.SCALE and x is None and signs is None):
        raise ValueError(
            "the gradient of x or shift needs x, mask or codes, that of scale x or signs; got none of them"
        )
    shift, scale = _parameter("shift", shift, groups), _parameter("scale", scale, groups)
    dx = kept_memory.empty((rows, columns) if needs & Grad.X else (0,), grad.dtype)
    dscale, dshift = (
        torch.empty(groups if needs & what else 0, dtype=torch.float32, device="cpu")
        for what in (Grad.SCALE, Grad.SHIFT)
    )
    _C.binarize_backward_cpu(  # type: ignore[union-attr]
        **_fields(grad, shift, scale, groups, inner, surrogate, p0, p1), grad=pointer(grad), x=pointer(x),
        signs=pointer(signs), mask=pointer(mask), codes=pointer(codes), dx=pointer(dx), dscale=pointer(dscale),
        dshift=pointer(dshift),
    )  # fmt: skip
    return dx, dscale, dshift
