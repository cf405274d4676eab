"""The region ops (docs/design.md, "The region contract") and the kernels that run them.

R regions of P values that lie one after another; the mask has one row for R / len(mask) regions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend_cpp, backend_cuda, backend_triton, kept_memory, region_reference
from .compiled import _C, DTYPES, pointer
from .contract import NUM_REGION_COEFS, NUM_REGION_STATS, RegionWant
from .ops import _define
from .registry import kernel

__all__ = ["region_reference", "split_count"]

TARGET_DTYPES = {**DTYPES, torch.bool: 3, torch.uint8: 3}  # kByte of csrc/region_stats.h


def _stats_fake(logits: Tensor, target: Tensor, mask: Any = None, want: int = 0, sharpness: float = 1.0) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((NUM_REGION_STATS, logits.shape[0]), dtype=dtype)


_TAIL = "Tensor logits, Tensor target, Tensor? mask=None, int want=0, float sharpness=1.0) -> Tensor"
_define(f"region_stats({_TAIL}", _stats_fake)
_define(
    f"region_stats_backward(Tensor coef, {_TAIL}",
    lambda coef, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


def split_count(regions: int, size: int) -> int:
    """Blocks that share a region on a GPU: enough for the largest one, none with less than 8192 values where there are
    enough, none with more than 131072: a thread then adds at most 512 numbers in float32."""
    return max(1, min(-(-size // 8192), -(-2048 // max(regions, 1))), -(-size // 131072))


def _why_not(logits: Tensor, target: Tensor, mask: Tensor | None, *_: Any) -> str | None:
    """Why a compiled region kernel cannot take these tensors, or None."""
    if logits.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16 logits, got {logits.dtype}"
    if target.dtype not in (logits.dtype, torch.float32, torch.bool, torch.uint8):
        return f"takes targets in {logits.dtype}, torch.float32, torch.bool or torch.uint8, got {target.dtype}"
    if not logits.is_contiguous() or not target.is_contiguous() or not (mask is None or mask.is_contiguous()):
        return "takes contiguous regions"
    return None


def _check(logits: Tensor, target: Tensor, mask: Tensor | None, want: int) -> None:
    """Kernels read all tensors by the shape of the logits: another one would be read out of bounds."""
    if want & RegionWant.PROBABILITIES and want & (RegionWant.CROSS_ENTROPY | RegionWant.ENTROPY):
        raise ValueError("cross entropy and entropy are those of logits; with probabilities they are not computed")
    if logits.dim() != 2 or target.shape != logits.shape:
        raise ValueError(f"logits and target must be [R, P], got {tuple(logits.shape)} and {tuple(target.shape)}")
    if mask is None:
        return
    if mask.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"mask must be torch.bool or torch.uint8, got {mask.dtype}")
    regions, size = logits.shape
    if mask.dim() != 2 or mask.shape[1] != size or not len(mask) or regions % len(mask):
        raise ValueError(f"mask must be [R / k, P] for logits {tuple(logits.shape)}, got {tuple(mask.shape)}")


def _check_coefficients(coef: Tensor, logits: Tensor) -> Tensor:
    if coef.shape != (NUM_REGION_COEFS, logits.shape[0]):
        raise ValueError(f"coef must have shape [{NUM_REGION_COEFS}, {logits.shape[0]}], got {tuple(coef.shape)}")
    return coef.to(torch.float32).contiguous()


def _fields(logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float) -> dict[str, Any]:
    """The fields of csrc/region_stats.h's RegionStats that both ops fill alike."""
    return dict(
        logits=pointer(logits), target=pointer(target), mask=pointer(mask), n=logits.shape[0], size=logits.shape[1],
        mask_share=1 if mask is None else logits.shape[0] // len(mask), dtype=DTYPES[logits.dtype],
        target_dtype=TARGET_DTYPES[target.dtype], want=int(want), sharpness=sharpness,
    )  # fmt: skip


def _statistics(logits: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """The statistics that `run` makes; those of empty regions are 0."""
    if logits.numel() == 0:
        return torch.zeros(NUM_REGION_STATS, logits.shape[0], dtype=torch.float32, device=logits.device)
    return run()


def merge(part: Tensor) -> Tensor:
    """stats [10, R] from the partial sums [10, splits, R] of a GPU."""
    return part[:, 0] if part.shape[1] == 1 else part.sum(1, dtype=torch.float64).to(torch.float32)


# ---------------------------------------------------------------------------------------------- cpp


@kernel("region_stats", "cpp", lambda logits, *a: backend_cpp._missing(logits) or _why_not(logits, *a))
def _region_stats_cpp(logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float) -> Tensor:
    _check(logits, target, mask, want)

    def run() -> Tensor:
        stats = torch.empty(NUM_REGION_STATS, logits.shape[0], dtype=torch.float32, device="cpu")
        fields = _fields(logits, target, mask, want, sharpness)
        _C.region_stats_cpu(**fields, coef=0, stats=pointer(stats), dlogits=0, isa=backend_cpp.ISA)  # type: ignore[union-attr]
        return stats

    return _statistics(logits, run)


@kernel("region_stats_backward", "cpp", lambda coef, logits, *a: backend_cpp._missing(logits) or _why_not(logits, *a))
def _region_stats_backward_cpp(
    coef: Tensor, logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float
) -> Tensor:
    _check(logits, target, mask, want)
    coef = _check_coefficients(coef, logits)
    out = kept_memory.empty(logits.shape, logits.dtype)
    fields = _fields(logits, target, mask, want, sharpness)
    _C.region_stats_cpu(**fields, coef=pointer(coef), stats=0, dlogits=pointer(out), isa=backend_cpp.ISA)  # type: ignore[union-attr]
    return out


# ---------------------------------------------------------------------------------------------- cuda


def _launch(logits: Tensor, slices: int, **fields: Any) -> None:
    device = logits.device.index
    stream = torch._C._cuda_getCurrentRawStream(device)
    _C.region_stats_cuda(**fields, slices=slices, device=device, stream=stream)  # type: ignore[union-attr]


def _missing_cuda(logits: Tensor) -> str | None:
    return backend_cuda._missing(logits)


@kernel("region_stats", "cuda", lambda logits, *a: _missing_cuda(logits) or _why_not(logits, *a))
def _region_stats_cuda(logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float) -> Tensor:
    _check(logits, target, mask, want)

    def run() -> Tensor:
        slices = split_count(*logits.shape)
        part = torch.empty(NUM_REGION_STATS, slices, len(logits), dtype=torch.float32, device=logits.device)
        fields = _fields(logits, target, mask, want, sharpness)
        _launch(logits, slices, **fields, coef=0, stats=pointer(part), dlogits=0)
        return merge(part)

    return _statistics(logits, run)


@kernel("region_stats_backward", "cuda", lambda coef, logits, *a: _missing_cuda(logits) or _why_not(logits, *a))
def _region_stats_backward_cuda(
    coef: Tensor, logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float
) -> Tensor:
    _check(logits, target, mask, want)
    coef, out = _check_coefficients(coef, logits), torch.empty_like(logits)
    if logits.numel():
        fields = _fields(logits, target, mask, want, sharpness)
        slices = split_count(*logits.shape)
        _launch(logits, slices, **fields, coef=pointer(coef), stats=0, dlogits=pointer(out))
    return out


# ---------------------------------------------------------------------------------------------- triton


@kernel("region_stats", "triton", lambda logits, *a: backend_triton._missing(logits) or _why_not(logits, *a))
def _region_stats_triton(logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float) -> Tensor:
    from .triton_kernels import region_stats as kernels

    _check(logits, target, mask, want)
    splits = split_count(*logits.shape)
    return _statistics(logits, lambda: merge(kernels.region_stats(logits, target, mask, want, sharpness, splits)))


@kernel(
    "region_stats_backward", "triton", lambda coef, logits, *a: backend_triton._missing(logits) or _why_not(logits, *a)
)
def _region_stats_backward_triton(
    coef: Tensor, logits: Tensor, target: Tensor, mask: Tensor | None, want: int, sharpness: float
) -> Tensor:
    from .triton_kernels import region_stats as kernels

    _check(logits, target, mask, want)
    return kernels.region_stats_backward(_check_coefficients(coef, logits), logits, target, mask, want, sharpness)
