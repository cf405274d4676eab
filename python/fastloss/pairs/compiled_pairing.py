"""`CompiledPairing`: a Pairing as csrc/pair_stats.h has it, addresses and sizes by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compiled import DTYPES, pointer
from ..contract import PairNeeds
from .ops import empty_gradients
from .pairing import PAIRING_LENGTH, Pairing, check_pairing


def why_not_pairing(*args: Any) -> str | None:
    """Why the compiled kernels cannot take the pairing that `args` begin with, or None."""
    p = Pairing(*args[:PAIRING_LENGTH])
    if p.q.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16, got {p.q.dtype}"
    if p.guide_q is not None and p.guide_q.dtype not in DTYPES:
        return f"takes guides in float32, float16 and bfloat16, got {p.guide_q.dtype}"
    if max(p.q.shape[0], p.k.shape[0]) >= 2**31:
        return f"counts rows and columns with 32 bits, got {p.q.shape[0]} and {p.k.shape[0]}"
    return None


def _operand(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


class CompiledPairing:
    """The fields of a pairing that was checked. It keeps alive what they point to."""

    def __init__(self, *args: Any) -> None:
        p = Pairing(*args)
        check_pairing(p)
        self.pairing = p
        self.q, self.k = _operand(p.q), _operand(p.k)
        guides = [None if g is None else _operand(g) for g in (p.guide_q, p.guide_k)]
        m, n = p.shape
        named: dict[str, Tensor | None] = {"q": self.q, "k": self.k, "guide_q": guides[0], "guide_k": guides[1]}
        for name in ("row_scale", "column_scale", "low", "high", "guide_limit"):
            value = getattr(p, name)
            named[name] = None if value is None else value.detach().to(torch.float32).contiguous()
        for name, dtypes in (
            ("row_valid", (torch.uint8, torch.bool)), ("column_valid", (torch.uint8, torch.bool)),
            ("positive_rows", (torch.int32,)), ("positive_columns", (torch.int32,)), ("excluded_rows", (torch.int32,)),
            ("excluded_columns", (torch.int32,)),
        ):  # fmt: skip
            value = getattr(p, name)
            if value is not None and value.dtype not in dtypes:
                raise TypeError(f"{name} must have dtype {dtypes[0]}, got {value.dtype}")
            named[name] = None if value is None else value.contiguous()
        self.kept = named
        self.fields: dict[str, Any] = {name: pointer(value) for name, value in named.items()}
        self.fields |= dict(
            m=m, n=n, d=p.q.shape[1], ldq=self.q.stride(0), ldk=self.k.stride(0), dtype=DTYPES[p.q.dtype],
            positive_diagonals=tuple(p.positive_diagonals), excluded_diagonals=tuple(p.excluded_diagonals),
            guide_d=0 if guides[0] is None else guides[0].shape[1],
            ld_guide_q=0 if guides[0] is None else guides[0].stride(0),
            ld_guide_k=0 if guides[1] is None else guides[1].stride(0),
            guide_dtype=0 if guides[0] is None else DTYPES[guides[0].dtype],
        )  # fmt: skip

    def numbers(self, name: str, values: Tensor | None) -> Tensor | None:
        """float32 [M], checked."""
        if values is None:
            return None
        m = self.pairing.shape[0]
        if values.shape != (m,):
            raise ValueError(f"{name} must have shape [{m}], got {tuple(values.shape)}")
        return values.detach().to(torch.float32).contiguous()

    def gradients(self, needs: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[int, int, int, int]]:
        """Memory for the gradients that are needed, and its addresses, 0 for those that are not."""
        p = self.pairing
        made = tuple(x.contiguous() for x in empty_gradients(p.q, p.k, p.column_scale, needs))
        if p.column_scale is None:
            needs &= ~PairNeeds.COLUMN_SCALE
        flags = (PairNeeds.Q, PairNeeds.K, PairNeeds.ROW_SCALE, PairNeeds.COLUMN_SCALE)
        addresses = tuple(pointer(x) if needs & flag else 0 for x, flag in zip(made, flags, strict=True))
        return made, addresses  # type: ignore[return-value]
