"""`lossless_linear` of the `cuda` backend (csrc/cuda/lossless_linear.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend_cuda
from ..compiled import _C, pointer
from ..registry import kernel
from .contract import GROUP, PLAN_HEAD, Codec, Number, Section

#: Rows of x. For more, decoding the weights once and a product of cuBLAS cost less: `lossless_decode`, then `linear`.
MOST_INPUTS = 64
_ALIGNMENT = 16  # cp.async copies 16 bytes at a time


def _why_not(x: Tensor, blob: Tensor, plan: Sequence[int], bias: Tensor | None = None) -> str | None:
    if reason := backend_cuda._missing(x):
        return reason
    codec, number, columns = plan[0], plan[1], plan[5]
    if codec != Codec.P7 or number != Number.BF16:
        return f"multiplies P7 of bf16, got {Codec(codec).name} of {Number(number).name}"
    if columns % GROUP or not 0 < columns < 2**27:
        return f"takes columns that are a multiple of {GROUP} below 2^27, got {columns}"
    if x.shape[0] > MOST_INPUTS:
        return f"takes up to {MOST_INPUTS} rows of x, got {x.shape[0]}: decode the weights and multiply"
    if not plan[PLAN_HEAD + 2 * Section.BYTES0 + 1]:
        return "takes blobs that have a byte plane; every number of this one is +0 or a positive power of two"
    if blob.device != x.device:
        return f"takes tensors of one device, got {x.device} and {blob.device}"
    if blob.data_ptr() % _ALIGNMENT or not blob.is_contiguous():
        return f"takes contiguous blobs aligned to {_ALIGNMENT} bytes"
    return None


@kernel("lossless_linear", "cuda", _why_not)
def lossless_linear(x: Tensor, blob: Tensor, plan: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, the weights decoded into the registers of the tensor cores.

    Where a weight is stored as an escape and its column of x is infinite, up to 15 rows beside it become NaN.
    """
    n, rows, columns = x.shape[0], plan[4], plan[5]
    x = x.contiguous()
    if x.data_ptr() % _ALIGNMENT:
        x = x.clone()
    bias = None if bias is None else bias.contiguous()
    device = x.device.index
    out = torch.empty((n, rows), dtype=x.dtype, device=x.device)
    parts = _C.lossless_linear_parts_cuda(rows, columns, device)  # type: ignore[union-attr]
    scratch = torch.empty((parts, n, rows), dtype=torch.float32, device=x.device) if parts else None
    _C.lossless_linear_cuda(  # type: ignore[union-attr]
        x=pointer(x), n=n, blob=pointer(blob), plan=list(plan), bias=pointer(bias), out=pointer(out),
        parts=pointer(scratch), device=device, stream=torch._C._cuda_getCurrentRawStream(device),
    )  # fmt: skip
    return out
