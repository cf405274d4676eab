"""The bit ops (docs/design.md, "The bit contract"): schemas and fakes. Each backend registers its kernels itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import _define
from . import checks
from .contract import Grad, HashGrad, Save, row_bytes


def wide(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32


def _bits(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty((*shape[:-1], row_bytes(shape[-1])), dtype=torch.uint8)


def _integers(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.int32)


def _pack_bits_fake(
    x: Tensor, kind: int, center: Tensor | None = None, scale: Tensor | None = None, group: int = 0, low: int = 0, planes: int = 1
) -> tuple[Tensor, Tensor]:  # fmt: skip
    planes = {0: 1, 1: 2}.get(kind, planes)  # signs have one, ternary numbers two
    return _bits(x, planes, *x.shape), _integers(x, planes, x.shape[0])


_define(
    "pack_bits(Tensor x, int kind, Tensor? center=None, Tensor? scale=None, int group=0, int low=0, int planes=1)"
    " -> (Tensor, Tensor)",
    _pack_bits_fake,
    checks.pack_bits,
)
_define(
    "unpack_bits(Tensor planes, int columns, int[] weights, int offset, Tensor? scale, int group, ScalarType dtype) -> Tensor",
    lambda planes, columns, weights, offset, scale, group, dtype: planes.new_empty(
        (planes.shape[1], columns), dtype=dtype
    ),
    checks.unpack_bits,
)

_PRODUCT = (
    "Tensor a, Tensor a_popcounts, Tensor b, Tensor b_popcounts, int columns, int[] a_weights, int a_offset,"
    " int[] b_weights, int b_offset"
)
_EPILOGUE = "Tensor? row_scale, Tensor? column_scale, Tensor? bias, int activation"
_define(
    f"bgemm({_PRODUCT}, {_EPILOGUE}, ScalarType dtype) -> Tensor",
    lambda a, a_popcounts, b, *rest: a.new_empty((a.shape[1], b.shape[1]), dtype=rest[-1]),
)
_define(
    f"bgemm_signs({_PRODUCT}, {_EPILOGUE}) -> (Tensor, Tensor)",
    lambda a, a_popcounts, b, *rest: (_bits(a, 1, a.shape[1], b.shape[1]), _integers(a, 1, a.shape[1])),
)
_define(
    f"hamming_topk({_PRODUCT}, Tensor? b_scale, int count) -> (Tensor, Tensor)",
    lambda a, a_popcounts, b, *rest: (
        a.new_empty((a.shape[1], rest[-1]), dtype=torch.int32 if rest[-2] is None else torch.float32),
        a.new_empty((a.shape[1], rest[-1]), dtype=torch.int64),
    ),
)
_define(
    "lowbit_matmul(Tensor x, Tensor planes, int columns, int[] weights, int offset, Tensor? scale, int group,"
    " bool transposed, Tensor? x_scale, Tensor? bias, ScalarType dtype) -> Tensor",
    lambda x, planes, columns, weights, offset, scale, group, transposed, x_scale, bias, dtype: x.new_empty(
        (x.shape[0], columns if transposed else planes.shape[1]), dtype=dtype
    ),
)


def _binarize_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    save = rest[-1]
    rows, columns = x.shape
    return (
        x.new_empty((rows, columns) if save & Save.DENSE else (0,)),
        _bits(x, rows, columns) if save & Save.SIGNS else x.new_empty(0, dtype=torch.uint8),
        _integers(x, rows if save & Save.SIGNS else 0),
        _bits(x, rows, columns) if save & Save.MASK else x.new_empty(0, dtype=torch.uint8),
        x.new_empty((rows, columns) if save & Save.CODES else (0,), dtype=torch.uint8),
    )


def _gradients(grad: Tensor, groups: int, needs: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(grad.shape if needs & Grad.X else (0,)),
        grad.new_empty(groups if needs & Grad.SCALE else 0, dtype=wide(grad)),
        grad.new_empty(groups if needs & Grad.SHIFT else 0, dtype=wide(grad)),
    )


_define(
    "binarize(Tensor x, Tensor? shift, Tensor? scale, int groups, int inner, int surrogate, float p0, float p1, int save)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _binarize_fake,
    checks.binarize,
)
_define(
    "binarize_backward(Tensor grad, Tensor? x, Tensor? signs, Tensor? mask, Tensor? codes, Tensor? shift, Tensor? scale,"
    " int groups, int inner, int surrogate, float p0, float p1, int needs) -> (Tensor, Tensor, Tensor)",
    lambda grad, x, signs, mask, codes, shift, scale, groups, *rest: _gradients(grad, groups, rest[-1]),
    checks.binarize_backward,
)

_QUANTIZER = (
    "Tensor scale, Tensor? offset, Tensor? zero_point, int groups, int inner, float low, float high, float steps,"
    " float shift, bool rounded"
)
_define(f"fake_quant(Tensor x, {_QUANTIZER}) -> Tensor", lambda x, *_: x.new_empty(x.shape), checks.fake_quant)
_define(
    f"fake_quant_backward(Tensor grad, Tensor x, {_QUANTIZER}, int needs) -> (Tensor, Tensor, Tensor)",
    lambda grad, x, scale, offset, zero_point, groups, *rest: _gradients(grad, groups, rest[-1]),
    checks.fake_quant_backward,
)


def _quantize_groups_fake(x: Tensor, group: int, bits: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = -(-x.shape[0] // group)
    table = x.new_empty(count, dtype=torch.float32)
    return x.new_empty((count, group * bits // 8), dtype=torch.uint8), table, torch.empty_like(table)


_define(
    "quantize_groups(Tensor x, int group, int bits, Tensor? low=None, Tensor? high=None, Tensor? seed=None)"
    " -> (Tensor, Tensor, Tensor)",
    _quantize_groups_fake,
    checks.quantize_groups,
)
_define(
    "dequantize_groups(Tensor codes, Tensor low, Tensor step, int n, int group, int bits, ScalarType dtype) -> Tensor",
    lambda codes, low, step, n, group, bits, dtype: codes.new_empty(n, dtype=dtype),
    checks.dequantize_groups,
)

_define(
    "nearest_key(Tensor x, Tensor keys) -> Tensor",
    lambda x, keys: x.new_empty(x.shape[0], dtype=torch.int64),
)

_define(
    "hash_attention(Tensor q, Tensor k, Tensor v, bool own, bool causal) -> (Tensor, Tensor)",
    lambda q, k, v, *_: (v.new_empty((*q.shape[:2], v.shape[2])), v.new_empty(q.shape[:2], dtype=wide(v))),
)
_define(
    "hash_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor d, bool own, bool causal,"
    " int needs) -> (Tensor, Tensor, Tensor)",
    lambda grad, q, k, v, out, d, own, causal, needs: (
        q.new_empty(q.shape if needs & HashGrad.Q else (0,)),
        k.new_empty(k.shape if needs & HashGrad.K else (0,)),
        v.new_empty(v.shape if needs & HashGrad.V else (0,)),
    ),
)

from . import (  # noqa: E402,F401  (they register their kernels)
    cpp,
    cuda,
    reference_bits,
    reference_groups,
    reference_hash,
    reference_quant,
    triton,
)
