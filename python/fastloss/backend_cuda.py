"""The `cuda` backend: hand-written CUDA row kernels (csrc/cuda); the linear ops are cuBLAS GEMMs in chunks around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compiled import _C, DTYPES, MISSING, CompiledRows, register, why_not_rows
from .compiled_pointwise import CompiledPointwise
from .compiled_terms import CompiledTerms, register_terms
from .device_checks import check_listed, check_targets
from .registry import kernel


def _launch(logits: Tensor, /, **fields: Any) -> None:
    device = logits.device.index
    stream = torch._C._cuda_getCurrentRawStream(device)
    _C.row_stats_cuda(**{"upstream": 0, **fields}, device=device, stream=stream)  # type: ignore[union-attr]


def _missing(x: Tensor) -> str | None:
    if MISSING:
        return MISSING
    if not _C.cuda:  # type: ignore[union-attr]
        return "the extension was built without CUDA: put nvcc on PATH and reinstall"
    if x.device.type != "cuda":
        return f"runs on CUDA tensors, got {x.device}"
    if x.shape[-1] >= 2**31:
        return f"counts columns with 32 bits, got {x.shape[-1]}"
    return None


rows = CompiledRows(_launch, lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))
register("cuda", rows, _missing, check_targets)


def _why_not_again(
    dlogits: Tensor, upstream: Tensor, coef: Tensor, stats: Tensor, argmax: Tensor, *args: Any
) -> str | None:
    logits, _, prob, *_ = args
    return _missing(logits) or why_not_rows(logits, prob)


@kernel("row_stats_backward_unless_one_", "cuda", _why_not_again)
def row_stats_backward_unless_one_(dlogits: Tensor, upstream: Tensor, *args: Any) -> None:
    """row_stats_backward(*args) into dlogits, unless upstream, one number on the device, is 1."""
    upstream = upstream.to(torch.float32)
    rows.row_stats_backward(*args, out=dlogits, upstream=upstream.data_ptr())


def _why_not_scale(x: Tensor, factor: Tensor) -> str | None:
    if reason := _missing(x):
        return reason
    if x.dtype not in DTYPES or not x.is_contiguous():
        return f"scales contiguous float32, float16 and bfloat16, got {x.dtype}"
    return None


@kernel("scale_unless_one_", "cuda", _why_not_scale)
def scale_unless_one_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, one number on the device; nothing is read or written where it is 1."""
    device, factor = x.device.index, factor.to(torch.float32)
    stream = torch._C._cuda_getCurrentRawStream(device)
    _C.scale_cuda(x.data_ptr(), DTYPES[x.dtype], x.numel(), factor.data_ptr(), device, stream)  # type: ignore[union-attr]


def _launch_pointwise(input: Tensor, *args: Any, unless_one: bool = False) -> None:
    device = input.device.index
    partial = torch.empty(_C.MOST_PARTIALS, dtype=torch.float64, device=input.device)  # type: ignore[union-attr]
    stream = torch._C._cuda_getCurrentRawStream(device)
    _C.pointwise_loss_cuda(*args, partial.data_ptr(), unless_one, device, stream)  # type: ignore[union-attr]


CompiledPointwise(
    _launch_pointwise, lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device)
).register("cuda", _missing)


def _launch_terms(logits: Tensor, /, **fields: Any) -> None:
    device = logits.device.index
    stream = torch._C._cuda_getCurrentRawStream(device)
    _C.row_terms_cuda(_C.RowTerms(**fields), device, stream)  # type: ignore[union-attr]


terms = CompiledTerms(_launch_terms, rows.empty_like)
register_terms("cuda", terms, _missing, check_listed, most_listed=getattr(_C, "MOST_LISTED", None))
