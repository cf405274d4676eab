"""Glue shared by the pair kernels of the compiled extension: tensors become the addresses of a `_C.Pairing`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compiled import _C, DTYPES, pointer
from .pairing import Pairing, check_pairing


def why_not_pairing(p: Pairing) -> str | None:
    """Why a compiled pair kernel cannot take these operands, or None."""
    for name, x in (("q", p.q), ("guide_q", p.guide_q)):
        if x is not None and x.dtype not in DTYPES:
            return f"takes {name} in float32, float16 or bfloat16, got {x.dtype}"
        if x is not None and x.dim() == 2 and x.shape[1] == 0:
            return f"takes {name} of at least one feature"
    return None


class CompiledPairing:
    """A checked pairing with the addresses of its tensors, which live as long as this does."""

    def __init__(self, p: Pairing) -> None:
        check_pairing(p)
        self.alive: list[Tensor] = []
        (m, n), guide_d = p.shape, 0 if p.guide_q is None else p.guide_q.shape[1]
        fields: dict[str, Any] = {name: list(getattr(p, name)) for name in ("positive_diagonals", "excluded_diagonals")}
        for name in ("row_scale", "column_scale", "low", "high", "guide_limit"):
            fields[name] = self.address(getattr(p, name), torch.float32)
        for name in ("row_valid", "column_valid"):
            valid = getattr(p, name)
            fields[name] = self.address(None if valid is None else valid != 0, torch.uint8)
        for name in ("positive_rows", "positive_columns", "excluded_rows", "excluded_columns"):
            fields[name] = self.address(getattr(p, name), torch.int32)
        q, k, guide_q, guide_k = (self.operand(x) for x in (p.q, p.k, p.guide_q, p.guide_k))
        self.native = _C.Pairing(  # type: ignore[union-attr]
            q=q[0], k=k[0], ldq=q[1], ldk=k[1], m=m, n=n, d=p.q.shape[1], dtype=DTYPES[p.q.dtype],
            guide_q=guide_q[0], guide_k=guide_k[0], ld_guide_q=guide_q[1], ld_guide_k=guide_k[1], guide_d=guide_d,
            guide_dtype=0 if p.guide_q is None else DTYPES[p.guide_q.dtype], **fields,
        )  # fmt: skip

    def address(self, x: Tensor | None, dtype: torch.dtype) -> int:
        """Of `x` as contiguous numbers of `dtype`; 0 for None."""
        if x is None:
            return 0
        self.alive.append(x.to(dtype).contiguous())
        return pointer(self.alive[-1])

    def operand(self, x: Tensor | None) -> tuple[int, int]:
        """The address and the stride of the rows."""
        if x is None:
            return 0, 0
        self.alive.append(x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous())
        return pointer(self.alive[-1]), self.alive[-1].stride(0)
