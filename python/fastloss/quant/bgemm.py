"""Products of packed operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops  # noqa: F401  (ops registers what torch.ops.fastloss holds)
from .bit_tensor import BitTensor, check_bits
from .contract import Activation

_ops = torch.ops.fastloss
ACTIVATIONS: dict[str | None, Activation] = {None: Activation.NONE, **{a.name.lower(): a for a in Activation if a}}


def check_product(a: BitTensor, b: BitTensor) -> None:
    """Raise unless a bᵀ is a product of rows of equal length on one device, b with two dimensions."""
    check_bits("a", a)
    check_bits("b", b)
    if a.columns != b.columns or b.planes.dim() != 3:
        raise ValueError(f"a and b must be [..., K] and [N, K], got {list(a.shape)} and {list(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"a and b must be on one device, got {a.device} and {b.device}")


def product_arguments(a: BitTensor, b: BitTensor) -> list[Any]:
    """What the ops of products begin with."""
    return [*a.flat(), *b.flat(), a.columns, list(a.weights), a.offset, list(b.weights), b.offset]


def _row_scale(name: str, bits: BitTensor) -> Tensor | None:
    """[R], or None."""
    if bits.scale is None:
        return None
    if bits.scale.shape[1] != 1:
        raise ValueError(
            f"{name} has scales of groups of {bits.group} columns: bgemm takes one a row, lowbit_linear groups"
        )
    return bits.scale.expand(bits.rows, 1).reshape(-1)


def bgemm(
    a: BitTensor, b: BitTensor, bias: Tensor | None = None, *, activation: str | None = None,
    dtype: torch.dtype | None = None, packed: bool = False,
) -> Tensor | BitTensor:  # fmt: skip
    """activation(a bᵀ + bias) of two packed operands: binary, ternary or up to 4 bits, each with its scale.

    y_ij = activation((sum_k a_ik b_jk scale_i) scale_j + bias_j). The sum is an exact int32; the rest is float32,
    each step rounded.

    Args:
        a: [..., K]; b: [N, K]. Scales of rows, or none.
        bias: [N] float32, or None.
        activation: None, "relu", "hardtanh" or "silu".
        dtype: float32 (the default where there is a scale, a bias or an activation), float16, bfloat16; int32: the
            sum itself, without any
            of these (the default where there is none).
        packed: the signs of y as a BitTensor [..., N], for the next layer, instead of y.

    Raises ValueError and TypeError. No gradient: `binary_linear` and `lowbit_linear` have one.
    """
    check_product(a, b)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(str, ACTIVATIONS))}, got {activation!r}")
    if bias is not None and (bias.shape != (b.rows,) or bias.device != a.device):
        raise ValueError(f"bias must be [{b.rows}] on {a.device}, got {list(bias.shape)} on {bias.device}")
    plain = a.scale is None and b.scale is None and bias is None and activation is None
    if dtype is None:
        dtype = torch.int32 if plain and not packed else torch.float32
    if dtype not in (torch.int32, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dtype must be int32, float32, float16 or bfloat16, got {dtype}")
    if dtype == torch.int32 and not plain:
        raise ValueError("dtype int32 is the sum itself: without scales, bias and activation (._replace(scale=None))")
    epilogue = (
        _row_scale("a", a), _row_scale("b", b), None if bias is None else bias.detach().float(), int(ACTIVATIONS[activation])
    )  # fmt: skip
    arguments, lead = product_arguments(a, b), a.shape[:-1]
    if packed:
        planes, popcounts = _ops.bgemm_signs.default(*arguments, *epilogue)
        return BitTensor(
            planes.reshape(1, *lead, planes.shape[-1]), popcounts.reshape(1, *lead), None, b.rows, (2,), -1
        )
    return _ops.bgemm.default(*arguments, *epilogue, dtype).reshape(*lead, b.rows)
