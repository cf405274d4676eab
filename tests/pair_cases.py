"""Pairings for the tests of the pair ops: each way to say which pairs count, alone and together, at ragged shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.pairs import ops  # noqa: F401  (registers the ops)
from fastloss.pairs.pairing import Pairing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
#: (M, N, D): nothing is a multiple of a tile, and some is less than a vector.
SHAPES = ((1, 1, 1), (2, 65, 16), (63, 70, 48), (70, 333, 65), (130, 31, 384))
CASES = (
    "plain", "column_scale", "ids", "bits", "diagonals", "both_ids", "excluded_bits", "valid", "window", "guide",
    "everything", "no_negative", "no_pair",
)  # fmt: skip


def bits_of(member: Tensor) -> Tensor:
    """int32 [M, ceil(N / 32)] of a bool [M, N], the lowest bit first."""
    m, n = member.shape
    padded = torch.zeros(m, -(-n // 32) * 32, dtype=torch.int64)
    padded[:, :n] = member
    words = (padded.reshape(m, -1, 32) << torch.arange(32)).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def pairing(
    case: str, shape: tuple[int, int, int] = (70, 65, 24), dtype: torch.dtype = torch.float32, scale: float = 3.0
) -> Pairing:
    """The pairing named `case`. Scores are of the size of `scale`; the window has an edge in the middle of them."""
    m, n, d = shape
    q, k = (torch.randn(count, d) / d**0.25 for count in (m, n))
    rows, columns = torch.randint(5, (m,), dtype=torch.int32), torch.randint(5, (n,), dtype=torch.int32)
    named: dict[str, Any] = {
        "plain": {},
        "column_scale": {"column_scale": torch.rand(n) + 0.5},
        "ids": {"positive_rows": rows, "positive_columns": columns},
        "bits": {"positive_rows": bits_of(torch.rand(m, n) < 0.3)},
        "diagonals": {"positive_diagonals": (0,), "excluded_diagonals": (-1, 2)},
        "both_ids": {
            "positive_rows": rows, "positive_columns": columns, "excluded_rows": rows % 3,
            "excluded_columns": torch.randint(3, (n,), dtype=torch.int32), "positive_diagonals": (1,),
        },
        "excluded_bits": {"excluded_rows": bits_of(torch.rand(m, n) < 0.4), "positive_diagonals": (0, -3)},
        "valid": {"row_valid": torch.rand(m) < 0.7, "column_valid": torch.rand(n) < 0.7, "positive_diagonals": (0,)},
        "window": {"low": torch.full((m,), -0.5 * scale), "high": torch.rand(m) * scale, "positive_diagonals": (0,)},
        "guide": {
            "guide_q": torch.randn(m, 12).to(dtype), "guide_k": torch.randn(n, 12).to(dtype),
            "guide_limit": torch.rand(m), "positive_diagonals": (0,),
        },
        "no_negative": {"positive_rows": torch.zeros(m, dtype=torch.int32), "positive_columns": torch.zeros(n).int()},
        "no_pair": {"excluded_rows": torch.zeros(m, dtype=torch.int32), "excluded_columns": torch.zeros(n).int()},
    }  # fmt: skip
    named["everything"] = named["guide"] | named["window"] | named["both_ids"] | named["column_scale"] | named["valid"]
    given = named[case]
    for name in ("row_valid", "column_valid"):
        if name in given:
            valid = given[name]
            given[name] = valid.to(torch.uint8)
            (q if name == "row_valid" else k)[~valid] = float("nan")  # must not matter
    return Pairing(q.to(dtype), k.to(dtype), (torch.rand(m) + 0.5) * scale, **given)


def double(p: Pairing) -> Pairing:
    """The same in float64, whose dots are exact."""
    return Pairing(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in p))
