"""Softmax-aware binary attention: attention weights of 0 and 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .bgemm import bgemm
from .binarize import binarize
from .bit_tensor import BitTensor
from .bits import pack_bits
from .ops import wide

#: The paper's threshold, as a share of the largest attention weight of a row.
BETA = 0.25


def _check_beta(beta: float) -> None:
    if not 0 < beta <= 1:
        raise ValueError(f"beta must be in (0, 1], got {beta}")


def _threshold(scores: Tensor, beta: float) -> Tensor:
    """[..., 1]: softmax(s) >= beta max softmax(s) where s >= max s + ln beta, so no exponential is needed. A row without a
    finite score has none."""
    most = scores.amax(-1, keepdim=True)
    return torch.where(most == -math.inf, math.inf, most + math.log(beta))


class _SoftmaxAware(torch.autograd.Function):
    """1[s >= max s + ln beta]; the gradient is softmax's."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, scores: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(scores)
        return (scores >= _threshold(scores, beta)).to(scores.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (scores,) = ctx.saved_tensors  # type: ignore[attr-defined]
        a = torch.softmax(scores.to(wide(scores)), -1)
        g = grad.to(a.dtype)
        ds = a * (g - (a * g).sum(-1, keepdim=True))
        # A row that is masked altogether has no softmax, and nothing to learn.
        return torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, ds).to(grad.dtype), None


def softmax_aware_binarize(scores: Tensor, beta: float = BETA, *, packed: bool = False) -> Tensor | BitTensor:
    """b = 1[a >= beta max a], a = softmax(scores) along the last dimension, with the gradient of a.

    The largest weight of a row decides what counts as one, since softmax puts most weights near 0. The comparison is one
    of scores, s >= max s + ln beta.

    Args:
        scores: [..., K]; float32, float16, bfloat16, float64. A row of -inf alone gives zeros, a NaN a row of zeros.
        beta: 0.25 in the paper, from a regression of the best threshold against the largest weight.
        packed: b as a BitTensor of codes 0 and 1, and no gradient.

    "BiViT: Extremely Compressed Binary Vision Transformer". Saves the scores. Raises ValueError and TypeError.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(
            f"scores must be a floating tensor, got {scores.dtype if isinstance(scores, Tensor) else type(scores).__name__}"
        )
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores must be [..., K] with at least one column, got {list(scores.shape)}")
    _check_beta(beta)
    if not packed:
        return _SoftmaxAware.apply(scores, beta)
    s = scores.detach().to(wide(scores))
    rows = pack_bits(s, center=_threshold(s, beta).flatten())
    return rows._replace(weights=(1,), offset=0)


def binary_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None, beta: float = BETA,
    surrogate: str = "clip", binary_values: bool = True,
) -> Tensor:  # fmt: skip
    """out = b V', b = 1[softmax(s) >= beta max softmax(s)], s = scale sign(q) sign(k)ᵀ + mask, V' = sign(v).

    Args:
        q: [..., L, D]; k: [..., S, D]; v: [..., S, E], of one dtype.
        mask: added to the scores, or bool, False where a key is not seen; broadcasts with [..., L, S]. None.
        scale: None: 1 / sqrt(D).
        beta: see `softmax_aware_binarize`.
        surrogate: of the signs of q, k and v, as of `binarize`.
        binary_values: False keeps v as it is.

    Without gradients q, k and b are packed, the scores are products of bits and no exponential is taken: the result is
    the same. Rows that see no key are 0. There is no dropout, and b is not divided by its sum: the paper's default has no
    scale there. "BiViT: Extremely Compressed Binary Vision Transformer". Raises ValueError and TypeError.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.dim() < 2:
            raise TypeError(f"{name} must be a floating tensor [..., rows, columns]")
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1] or q.shape[:-2] != k.shape[:-2]:
        raise ValueError(
            f"q, k and v must be [..., L, D], [..., S, D] and [..., S, E], got {list(q.shape)}, {list(k.shape)} and "
            f"{list(v.shape)}"
        )
    if not q.shape[-1] or not k.shape[-2]:
        raise ValueError(f"D and S must be at least 1, got {list(q.shape)} and {list(k.shape)}")
    _check_beta(beta)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        sign_q, sign_k = binarize(q, surrogate), binarize(k, surrogate)
        sign_v = binarize(v, surrogate) if binary_values else v
        scores = _masked((sign_q @ sign_k.transpose(-1, -2)) * scale, mask)  # type: ignore[union-attr,operator]
        return softmax_aware_binarize(scores, beta) @ sign_v  # type: ignore[operator,return-value]
    return _inference(q, k, v, mask, scale, beta, surrogate, binary_values)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _inference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, beta: float, surrogate: str, binary_values: bool
) -> Tensor:
    lead = q.shape[:-2]
    bits_q, bits_k = (binarize(t.flatten(0, -3), surrogate, packed=True) for t in (_three(q), _three(k)))
    values = _three(v).flatten(0, -3)
    if binary_values:
        columns = binarize(values, surrogate)
        bits_v = pack_bits(columns.transpose(-1, -2).contiguous())  # type: ignore[union-attr]
    assert isinstance(bits_q, BitTensor) and isinstance(bits_k, BitTensor)
    products = [bgemm(_matrix(bits_q, i), _matrix(bits_k, i)) for i in range(values.shape[0])]
    if not products:
        return v.new_zeros((*lead, q.shape[-2], v.shape[-1]))
    scores = torch.stack(products).to(q.dtype) * scale  # type: ignore[arg-type]
    seen = softmax_aware_binarize(_masked(scores.reshape(*lead, *scores.shape[1:]), mask), beta, packed=binary_values)
    if not binary_values:
        return seen @ v  # type: ignore[operator]
    assert isinstance(seen, BitTensor)
    flat = seen._replace(
        planes=seen.planes.reshape(1, -1, *seen.planes.shape[-2:]), popcounts=seen.popcounts.reshape(1, -1, q.shape[-2])
    )
    found = [bgemm(_matrix(flat, i), _matrix(bits_v, i)) for i in range(values.shape[0])]
    return torch.stack(found).to(v.dtype).reshape(*lead, q.shape[-2], v.shape[-1])  # type: ignore[arg-type]


def _three(t: Tensor) -> Tensor:
    return t[None] if t.dim() == 2 else t


def _matrix(bits: BitTensor, index: int) -> BitTensor:
    """One of a batch of matrices."""
    return bits._replace(planes=bits.planes[:, index], popcounts=bits.popcounts[:, index])
