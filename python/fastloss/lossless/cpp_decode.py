"""`lossless_decode`, `lossless_decode_checked`, `lossless_rows` and `crc32c` of the `cpp` backend (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend_cpp, kept_memory
from ..compiled import _C, MISSING, pointer
from ..registry import kernel
from .contract import PLAN_HEAD, Section, check_plan


def why_not(blob: Tensor, *_: Any) -> str | None:
    """Why the compiled kernels cannot take a blob or bytes, or None. Scalar code too is faster than the reference."""
    if MISSING:
        return MISSING
    return None if blob.device.type == "cpu" else f"runs on CPU tensors, got {blob.device}"


def aligned(blob: Tensor) -> Tensor:
    """The blob, contiguous, where its 64-bit offsets lie at multiples of 8."""
    blob = blob.contiguous()
    return blob.clone() if blob.data_ptr() % 8 else blob


@kernel("lossless_decode", "cpp", why_not)
def lossless_decode(blob: Tensor, plan: Sequence[int], first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Numbers first..first+count in row-major order."""
    blob, out = aligned(blob), kept_memory.empty((count,), dtype)
    _C.lossless_decode_cpu(  # type: ignore[union-attr]
        blob=pointer(blob), plan=list(plan), item=dtype.itemsize, first=first, count=count, out=pointer(out),
        isa=backend_cpp.ISA,
    )  # fmt: skip
    return out


def why_not_into(blob: Tensor, plan: Sequence[int], out: Tensor) -> str | None:
    """Why the compiled kernel cannot decode into `out`, or None."""
    if reason := why_not(blob):
        return reason
    if not out.is_contiguous() or out.numel() != plan[3] or out.device != blob.device:
        return (
            f"writes {plan[3]} contiguous numbers on {blob.device}, "
            f"got {list(out.shape)} of strides {out.stride()} on {out.device}"
        )
    return None


def why_not_verify(blob: Tensor, plan: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why the compiled kernel cannot check these numbers, or None."""
    if reason := why_not(blob):
        return reason
    return None if plan[PLAN_HEAD + 2 * Section.BLOCK_CRC + 1] or not plan[3] else "there is no section BLOCK_CRC"


def _checked(blob: Tensor, plan: Sequence[int], dtype: torch.dtype, out: Tensor | None) -> int:
    check_plan(blob, plan, dtype)  # eager ops come without the checks of the others
    blob = aligned(blob)
    return _C.lossless_decode_checked_cpu(  # type: ignore[union-attr]
        blob=pointer(blob), plan=list(plan), item=dtype.itemsize, out=pointer(out), isa=backend_cpp.ISA
    )


@kernel(
    "lossless_decode_checked",
    "cpp",
    lambda blob, plan, out: why_not_into(blob, plan, out) or why_not_verify(blob, plan, out.dtype),
)
def lossless_decode_checked(blob: Tensor, plan: Sequence[int], out: Tensor) -> int:
    """Decode everything into the 1-D contiguous `out`; the first block whose checksum is wrong, or -1."""
    return _checked(blob, plan, out.dtype, out)


@kernel("lossless_verify", "cpp", why_not_verify)
def lossless_verify(blob: Tensor, plan: Sequence[int], dtype: torch.dtype) -> int:
    """The first block whose checksum is wrong, or -1; the decoded numbers never leave the cache."""
    return _checked(blob, plan, dtype, None)


@kernel("lossless_decode_into", "cpp", why_not_into)
def lossless_decode_into(blob: Tensor, plan: Sequence[int], out: Tensor) -> None:
    """Decode everything into the 1-D contiguous `out`."""
    check_plan(blob, plan, out.dtype)
    blob = aligned(blob)
    _C.lossless_decode_cpu(  # type: ignore[union-attr]
        blob=pointer(blob), plan=list(plan), item=out.element_size(), first=0, count=plan[3], out=pointer(out),
        isa=backend_cpp.ISA,
    )  # fmt: skip


@kernel("lossless_rows", "cpp", why_not)
def lossless_rows(blob: Tensor, plan: Sequence[int], index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the matrix; IndexError for a row that there is not."""
    rows, columns = plan[4], plan[5]
    blob, index = aligned(blob), index.to(torch.int64).contiguous()
    out = kept_memory.empty((index.shape[0], columns), dtype)
    bad = _C.lossless_rows_cpu(  # type: ignore[union-attr]
        blob=pointer(blob), plan=list(plan), item=dtype.itemsize, index=pointer(index), count=index.shape[0],
        out=pointer(out), isa=backend_cpp.ISA,
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(f"row {int(index[bad])} is out of bounds: rows are 0..{rows - 1}")
    return out


@kernel("crc32c", "cpp", why_not)
def crc32c(data: Tensor, block: int) -> Tensor:
    """crc32c of every `block` bytes, int64."""
    data = data.contiguous()
    crcs = torch.empty(-(-data.shape[0] // block), dtype=torch.int64, device="cpu")
    _C.crc32c_cpu(  # type: ignore[union-attr]
        data=pointer(data), bytes=data.shape[0], block=block, crcs=pointer(crcs), isa=backend_cpp.ISA
    )
    return crcs
