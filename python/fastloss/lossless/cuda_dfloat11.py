"""`dfloat11_decode` of the `cuda` backend (csrc/cuda/dfloat11_decode.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend_cuda
from ..compiled import _C, pointer
from ..registry import kernel

_THREAD_BYTES = 8


def _why_not(
    luts: Tensor, codes: Tensor, sign_mantissa: Tensor, output_positions: Tensor, gaps: Tensor, numel: int,
    bytes_per_thread: int = 8, threads_per_block: int = 512,
) -> str | None:  # fmt: skip
    if reason := backend_cuda._missing(luts):
        return reason
    if bytes_per_thread != _THREAD_BYTES:
        return f"decodes {_THREAD_BYTES} bytes a thread, got {bytes_per_thread}"
    if threads_per_block % 32:
        return f"takes threads_per_block a multiple of 32, got {threads_per_block}"
    return None


def _ready(t: Tensor, alignment: int) -> Tensor:
    t = t.contiguous()
    return t.clone() if t.data_ptr() % alignment else t


@kernel("dfloat11_decode", "cuda", _why_not)
def dfloat11_decode(
    luts: Tensor, codes: Tensor, sign_mantissa: Tensor, output_positions: Tensor, gaps: Tensor, numel: int,
    bytes_per_thread: int = 8, threads_per_block: int = 512,
) -> Tensor:  # fmt: skip
    """The numbers, bf16. Positions that do not rise from 0 to numel give wrong numbers here: to find them takes a wait."""
    luts, codes, sign_mantissa = _ready(luts, 1), _ready(codes, 4), _ready(sign_mantissa, 8)
    output_positions, gaps = _ready(output_positions, 4), _ready(gaps, 1)
    device = luts.device.index
    out = torch.empty(numel, dtype=torch.bfloat16, device=luts.device)
    if codes.numel() == 0:
        return out.zero_()
    _C.dfloat11_decode_cuda(  # type: ignore[union-attr]
        luts=pointer(luts), tables=luts.shape[0] - 1, codes=pointer(codes), code_bytes=codes.numel(),
        sign_mantissa=pointer(sign_mantissa), output_positions=pointer(output_positions), gaps=pointer(gaps),
        gap_bytes=gaps.numel(), out=pointer(out), numel=numel, threads=threads_per_block, device=device,
        stream=torch._C._cuda_getCurrentRawStream(device),
    )  # fmt: skip
    return out
