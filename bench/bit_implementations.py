"""Products of packed bits and the search through them, against torch's matrix products of the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from common import Group
from fastloss import quant
from implementations import CASES, Call, Case, ours


def _codes(rows: int, columns: int, device: str, bits: int) -> tuple[Tensor, quant.BitTensor]:
    """Numbers of `bits` bits in float32, and packed."""
    x = torch.randn(rows, columns, device=device)
    packed = quant.pack_bits(x) if bits == 1 else quant.pack_codes(x, 0.5, bits, odd=True)._replace(scale=None)
    return quant.unpack_bits(packed), packed


def bgemm(group: Group) -> Case:
    """a bᵀ, [M, K] and [N, K] of 1 bit ("binary") or 2 ("two_bits"), in the group's dtype. The others multiply the same
    numbers in bf16, fp32 and int8, each with its own result; packing is not measured."""
    m, n, k = group.shape
    torch.manual_seed(0)
    bits = 2 if group.mode == "two_bits" else 1
    (x, a), (w, b) = _codes(m, k, group.device, bits), _codes(n, k, group.device, bits)
    half, bytes_ = (x.bfloat16(), w.bfloat16()), (x.to(torch.int8), w.to(torch.int8))
    calls: dict[str, Call] = {
        "torch_bfloat16": lambda: half[0] @ half[1].T,
        "torch_float32": lambda: x @ w.T,
        "torch_int8": lambda: torch._int_mm(bytes_[0], bytes_[1].T),
        **ours(group.device, lambda: quant.bgemm(a, b, dtype=group.torch_dtype)),
    }
    result = m * n * group.torch_dtype.itemsize
    return Case(calls, (), a.nbytes + b.nbytes + result, 2 * m * n * k, gradient_bytes=result)


def hamming_topk(group: Group) -> Case:
    """The 10 nearest of N codes of K bits for each of M queries. "torch" multiplies signs in fp32 and sorts all scores."""
    m, n, k = group.shape
    torch.manual_seed(0)
    (x, queries), (w, database) = _codes(m, k, group.device, 1), _codes(n, k, group.device, 1)
    calls: dict[str, Call] = {
        "torch": lambda: (x @ w.T).topk(10),
        **ours(group.device, lambda: quant.hamming_topk(queries, database, 10)),
    }
    return Case(calls, (), queries.nbytes + database.nbytes, 2 * m * n * k)


CASES |= {"bgemm": bgemm, "hamming_topk": hamming_topk}
