"""`binarize` and its backward of the `cpp` backend (csrc/cpu/binarize.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend_cpp, kept_memory
from ..compiled import _C, DTYPES, pointer
from ..registry import kernel
from .contract import Grad, Save, Surrogate, row_bytes

# As plain integers: an enum's & and | take microseconds, as long as a small kernel.
_DENSE, _SIGNS, _MASK, _CODES = (int(save) for save in (Save.DENSE, Save.SIGNS, Save.MASK, Save.CODES))
_X, _SCALE, _SHIFT = (int(grad) for grad in (Grad.X, Grad.SCALE, Grad.SHIFT))
_IDENTITY = int(Surrogate.IDENTITY)
_ENDLESS = (_IDENTITY, int(Surrogate.BIPER))

_made = kept_memory.empty
# What is not asked for is made of these: the quickest way to an empty tensor.
_NO_BYTES, _NO_COUNTS, _NO_SUMS = (
    torch.empty(0, dtype=dtype, device="cpu") for dtype in (torch.uint8, torch.int32, torch.float32)
)


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
    if save & _CODES and surrogate in _ENDLESS:
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
    y = _made((rows, columns), x.dtype) if save & _DENSE else _NO_BYTES.new_empty(0, dtype=x.dtype)
    signs = _made((rows, width), torch.uint8) if save & _SIGNS else _NO_BYTES.new_empty(0)
    mask = _made((rows, width), torch.uint8) if save & _MASK else _NO_BYTES.new_empty(0)
    codes = _made((rows, columns), torch.uint8) if save & _CODES else _NO_BYTES.new_empty(0)
    popcounts = _NO_COUNTS.new_zeros(rows) if save & _SIGNS else _NO_COUNTS.new_empty(0)
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
    if codes is not None and args[4] in _ENDLESS:
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
    slopes = surrogate == _IDENTITY or any(t is not None for t in (x, mask, codes))
    if (needs & (_X | _SHIFT) and not slopes) or (needs & _SCALE and x is None and signs is None):
        raise ValueError(
            "the gradient of x or shift needs x, mask or codes, that of scale x or signs; got none of them"
        )
    shift, scale = _parameter("shift", shift, groups), _parameter("scale", scale, groups)
    dx = _made((rows, columns), grad.dtype) if needs & _X else _NO_BYTES.new_empty(0, dtype=grad.dtype)
    dscale, dshift = (_NO_SUMS.new_empty(groups if needs & what else 0) for what in (_SCALE, _SHIFT))
    _C.binarize_backward_cpu(  # type: ignore[union-attr]
        **_fields(grad, shift, scale, groups, inner, surrogate, p0, p1), grad=pointer(grad), x=pointer(x),
        signs=pointer(signs), mask=pointer(mask), codes=pointer(codes), dx=pointer(dx), dscale=pointer(dscale),
        dshift=pointer(dshift),
    )  # fmt: skip
    return dx, dscale, dshift
