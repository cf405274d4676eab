"""Attention of binary codes in time linear in the number of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..autograd import batched, forward_mode_active, functorch_active
from ..pairs.arguments import autocast_dtype
from . import ops, reference_hash
from .bit_tensor import BitTensor
from .bits import unpack_bits
from .contract import HashGrad

_ops = torch.ops.fastloss
BIASES = ("sum", "self")


class _HashAttention(torch.autograd.Function):
    """(out, D) of the op; the gradient is that of the formula, for any numbers as codes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, own: bool, causal: bool) -> Tensor:
        out, d = _ops.hash_attention.default(q, k, v, own, causal)
        ctx.save_for_backward(q, k, v, out, d)
        ctx.form = own, causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, d = ctx.saved_tensors
        flags = zip((HashGrad.Q, HashGrad.K, HashGrad.V), ctx.needs_input_grad, strict=False)
        needs = int(sum(flag for flag, needed in flags if needed))
        if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and batched(grad)):
            # A second derivative is also one through `out` and D: they are made again, of operations that have one.
            out, d = reference_hash.hash_attention(*(t.to(ops.wide(t)) for t in (q, k, v)), *ctx.form)
            made = reference_hash.hash_attention_backward(grad, q, k, v, out, d, *ctx.form, needs)
        else:
            made = _ops.hash_attention_backward.default(grad, q, k, v, out, d, *ctx.form, needs)
        given = (dt if needed else None for dt, needed in zip(made, ctx.needs_input_grad, strict=False))
        return (*given, None, None)


def _codes(name: str, codes: Tensor | BitTensor, dtype: torch.dtype) -> Tensor:
    if isinstance(codes, BitTensor):
        return unpack_bits(codes, dtype)
    if not isinstance(codes, Tensor) or not codes.is_floating_point():
        given = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"{name} must be a floating tensor or a BitTensor, got {given}")
    return codes.to(dtype)


def hash_attention(
    q_codes: Tensor | BitTensor, k_codes: Tensor | BitTensor, v: Tensor, *, bias: str = "sum", causal: bool = False
) -> Tensor:
    """out_i = sum_j (<q_i, k_j> + b) v_j / D_i, D_i = sum_j (<q_i, k_j> + b), b = bits + 1: attention whose weights are
    linear in the products of binary codes, so that no matrix of pairs is needed.

        D_i = <q_i, sum_j k_j> + M b,    out_i = (q_i (Kᵀ V) + b sum_j v_j) / D_i.

    Weights are at least 1 of codes of -1 and +1, so D_i >= M.

    Args:
        q_codes: [..., N, bits] of -1 and +1, as `kernel_hash` makes them; or a BitTensor. Rounded to the dtype of v.
        k_codes: [..., M, bits], the same.
        v: [..., M, E]; float32, float16, bfloat16 (float64 by PyTorch operations).
        bias: "sum": as above. "self": b times the token's own v stands for b sum_j v_j, with D_i as it is: what the
            released code of the paper computes (N = M).
        causal: sums over j <= i alone, M = i + 1 (N = M).

    Returns:
        [..., N, E] in the dtype of v; under autocast, in the dtype of autocast.

    Differentiable in v and in both codes, twice; saves its inputs, out and D. "EcoFormer: Energy-Saving Attention with
    Linear Complexity". Raises ValueError and TypeError for shapes, dtypes and devices that do not fit.
    """
    if bias not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {bias!r}")
    if not isinstance(v, Tensor) or not v.is_floating_point():
        raise TypeError(f"v must be a floating tensor, got {v.dtype if isinstance(v, Tensor) else type(v).__name__}")
    v = v.to(autocast_dtype(v))
    q, k = _codes("q_codes", q_codes, v.dtype), _codes("k_codes", k_codes, v.dtype)
    if q.device != v.device or k.device != v.device:
        raise ValueError(f"codes and v must be on one device, got {q.device}, {k.device} and {v.device}")
    given = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
    fits = min(q.dim(), k.dim(), v.dim()) >= 2 and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    if not fits or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(f"q_codes, k_codes and v must be [..., N, bits], [..., M, bits] and [..., M, E], got {given}")
    if (causal or bias == "self") and q.shape[-2] != k.shape[-2]:
        raise ValueError(f"causal=True and bias='self' need as many queries as keys, got {given}")
    if q.shape[-1] == 0 or k.shape[-2] == 0:
        raise ValueError(f"there must be at least one bit and one key, got {given}")
    flat = [t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:]) for t in (q, k, v)]
    form = bias == "self", causal
    if functorch_active() or forward_mode_active():
        out = reference_hash.hash_attention(*flat, *form)[0]
    else:
        out = _HashAttention.apply(*flat, *form)
    return out.reshape(*q.shape[:-1], v.shape[-1])
