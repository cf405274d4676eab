"""`lossless_linear` of the `cpp` backend (csrc/cpu/lossless_linear.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend_cpp, registry
from ..compiled import _C, pointer
from ..registry import kernel
from .contract import GROUP, Codec, Layout, Number
from .cpp_decode import aligned, why_not

#: Rows of x up to which the product from the codes is faster than decoding W for a library's GEMM: with AMX, of
#: 4096 x 4096 on one core, 2.4 times for 64 rows, 1.7 times for 128 and 0.8 times for 256.
MOST_ROWS = 128


def why_not_linear(x: Tensor, blob: Tensor, plan: Sequence[int], bias: Tensor | None = None) -> str | None:
    """Why the compiled kernel cannot multiply by this matrix, or None."""
    if missing := why_not(x):
        return missing
    codec, number, layout, numel, _, columns = plan[:6]
    if (codec, number, layout) != (Codec.P7, Number.BF16, Layout.ROWS):
        return f"takes P7 of BF16 in layout ROWS, got {Codec(codec).name} of {Number(number).name} in {Layout(layout).name}"
    if not numel or columns % GROUP:
        return f"takes columns a multiple of {GROUP}, got {plan[4]} x {columns}"
    if not 1 <= x.shape[0] <= MOST_ROWS:
        return f"takes 1 to {MOST_ROWS} rows of x, got {x.shape[0]}: decoding W and multiplying is faster for more"
    return None


@kernel("lossless_linear", "cpp", why_not_linear)
def lossless_linear(x: Tensor, blob: Tensor, plan: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias from the codes of W, fp32 sums rounded once; an x with infinities or NaN is multiplied by the decoded W.

    A pair of numbers that has no code counts as 0, 0 and is added separately: exact, but for 0 * infinity.
    """
    x, blob = x.contiguous(), aligned(blob)
    bias = None if bias is None else bias.contiguous()
    out = torch.empty((x.shape[0], plan[4]), dtype=x.dtype, device="cpu")
    finite = _C.lossless_linear_cpu(  # type: ignore[union-attr]
        blob=pointer(blob), plan=list(plan), x=pointer(x), n=x.shape[0], bias=pointer(bias), out=pointer(out),
        isa=backend_cpp.ISA,
    )  # fmt: skip
    if finite:
        return out
    weight = registry.run("lossless_decode", blob, plan, 0, plan[3], x.dtype).reshape(plan[4], plan[5])
    return torch.nn.functional.linear(x, weight, bias)
