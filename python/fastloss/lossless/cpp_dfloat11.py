"""`dfloat11_decode` of the `cpp` backend (csrc/cpu/dfloat11_decode.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend_cpp, kept_memory
from ..compiled import _C, pointer
from ..registry import kernel
from .reference_dfloat11 import positions_of


def why_not(luts: Tensor, *args: Any) -> str | None:
    """Why the compiled kernel cannot decode this, or None."""
    return backend_cpp._missing(luts)


@kernel("dfloat11_decode_checked", "cpp", why_not)
def dfloat11_decode_checked(
    luts: Tensor, codes: Tensor, sign_mantissa: Tensor, output_positions: Tensor, gaps: Tensor, numel: int,
    bytes_per_thread: int, threads_per_block: int,
) -> tuple[Tensor, int]:  # fmt: skip
    """(the numbers, the first damaged block or -1): of GAPS only those of a block's first thread are read."""
    blocks = -(-codes.numel() // (bytes_per_thread * threads_per_block))
    positions = positions_of(output_positions, numel).to(torch.int32)
    luts, codes, sign_mantissa, gaps = (t.contiguous() for t in (luts, codes, sign_mantissa, gaps))
    out = kept_memory.empty((numel,), torch.bfloat16)
    bad = _C.dfloat11_decode_cpu(  # type: ignore[union-attr]
        luts=pointer(luts), tables=luts.shape[0] - 1, codes=pointer(codes), code_bytes=codes.numel(),
        sign_mantissa=pointer(sign_mantissa), positions=pointer(positions), gaps=pointer(gaps), numel=numel,
        blocks=blocks, bytes_per_thread=bytes_per_thread, threads_per_block=threads_per_block, out=pointer(out),
    )  # fmt: skip
    return out, bad


@kernel("dfloat11_decode", "cpp", why_not)
def dfloat11_decode(
    luts: Tensor, codes: Tensor, sign_mantissa: Tensor, output_positions: Tensor, gaps: Tensor, numel: int,
    bytes_per_thread: int, threads_per_block: int,
) -> Tensor:  # fmt: skip
    """The numbers (bf16 [numel])."""
    return dfloat11_decode_checked(
        luts, codes, sign_mantissa, output_positions, gaps, numel, bytes_per_thread, threads_per_block
    )[0]  # fmt: skip
