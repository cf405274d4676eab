"""The gradient of a head's weight over chunks of rows, in bf16 on a CPU: float32 sums, rounded once (csrc/cpu/add_product.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .extension import _C

#: -1: AMX where the machine has it; 3, 4: AVX-512 bf16, AMX (tests).
ISA = -1


def takes(total: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the kernel can add aᵀ b to total: bfloat16 rows on an AVX-512 CPU, a float32 total without gaps."""
    return (
        _C is not None
        and a.device.type == "cpu"
        and a.dtype == b.dtype == torch.bfloat16
        and total.dtype == torch.float32
        and total.is_contiguous()
        and a.stride(1) == b.stride(1) == 1
        and _C.add_product_why_not(ISA) is None
    )


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool, rounded: Tensor | None = None) -> None:
    """total [V, D] += aᵀ b of a [N, V] and b [N, D]; `first`: total holds nothing yet.

    With `rounded` [V, D], bfloat16, the sums go there instead, and total is left as it was.
    """
    (n, v), d = a.shape, b.shape[1]
    if total.shape != (v, d) or len(b) != n or (rounded is not None and rounded.shape != (v, d)):
        raise ValueError(f"total {tuple(total.shape)} is not that of {tuple(a.shape)}ᵀ {tuple(b.shape)}")
    _C.add_product_cpu(  # type: ignore[union-attr]
        total=total.data_ptr(), a=a.data_ptr(), b=b.data_ptr(), rounded=0 if rounded is None else rounded.data_ptr(),
        n=n, v=v, d=d, lda=a.stride(0), ldb=b.stride(0), first=first, isa=ISA,
    )  # fmt: skip
