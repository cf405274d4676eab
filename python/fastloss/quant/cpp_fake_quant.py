"""`fake_quant` and its gradient of the `cpp` backend (csrc/cpu/fake_quant.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend_cpp, kept_memory
from ..compiled import _C, DTYPES, pointer
from ..registry import kernel
from .contract import Grad


def _why_not(
    x: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, groups: int, inner: int
) -> str | None:
    if missing := backend_cpp._missing(x):
        return missing
    if x.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16, got {x.dtype}"
    for name, parameter in (("scale", scale), ("offset", offset), ("zero_point", zero_point)):
        if parameter is not None and parameter.numel() not in (1, groups):
            return f"takes 1 or groups = {groups} numbers of {name}, got {parameter.numel()}"
    if groups < 1 or (groups > 1 and (inner < 1 or x.numel() % (groups * inner))):
        return f"takes groups * inner that divides the {x.numel()} elements, got {groups} * {inner}"
    return None


def _why_not_backward(grad: Tensor, x: Tensor, *args: Any) -> str | None:
    return _why_not(x, *args[:5]) or (
        None if grad.dtype == x.dtype else f"takes a gradient in {x.dtype}, got {grad.dtype}"
    )


def _spread(parameter: Tensor | None, groups: int) -> Tensor | None:
    return None if parameter is None else parameter.to(torch.float32).reshape(-1).expand(groups).contiguous()


def _launch(
    grad: Tensor | None, x: Tensor, out: Tensor | None, dscale: Tensor | None, doffset: Tensor | None, scale: Tensor,
    offset: Tensor | None, zero_point: Tensor | None, groups: int, inner: int, low: float, high: float, steps: float,
    shift: float, rounded: bool,
) -> None:  # fmt: skip
    x, grad = x.contiguous(), None if grad is None else grad.contiguous()
    given = (p for p in (scale, offset, zero_point) if p is not None)
    if dscale is None and doffset is None and all(p.numel() == 1 for p in given):
        groups = 1
    laid = [_spread(p, groups) for p in (scale, offset, zero_point)]
    fields = _C.FakeQuant(  # type: ignore[union-attr]
        grad=pointer(grad), x=pointer(x), scale=pointer(laid[0]), offset=pointer(laid[1]), zero_point=pointer(laid[2]),
        out=pointer(out), dscale=pointer(dscale), doffset=pointer(doffset), n=x.numel(), groups=groups,
        inner=max(inner, 1), low=low, high=high, steps=steps, shift=shift, rounded=rounded, dtype=DTYPES[x.dtype],
    )  # fmt: skip
    _C.fake_quant_cpu(fields, backend_cpp.ISA)  # type: ignore[union-attr]


@kernel("fake_quant", "cpp", lambda x, *args: _why_not(x, *args[:5]))
def fake_quant(x: Tensor, *quantizer: Any) -> Tensor:
    """y of docs/design.md, "fake_quant"."""
    y = kept_memory.empty(x.shape, x.dtype)
    _launch(None, x, y, None, None, *quantizer)
    return y


@kernel("fake_quant_backward", "cpp", _why_not_backward)
def fake_quant_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, doffset), with 0 elements where `needs` does not ask for them."""
    *quantizer, needs = args
    groups, f32 = quantizer[3], torch.float32
    dx = kept_memory.empty(x.shape if needs & Grad.X else (0,), x.dtype)
    dscale = torch.empty(groups if needs & Grad.SCALE else 0, dtype=f32, device="cpu")
    doffset = torch.empty(groups if needs & Grad.SHIFT else 0, dtype=f32, device="cpu")
    _launch(
        grad, x, dx if needs & Grad.X else None, dscale if needs & Grad.SCALE else None,
        doffset if needs & Grad.SHIFT else None, *quantizer,
    )  # fmt: skip
    return dx, dscale, doffset
