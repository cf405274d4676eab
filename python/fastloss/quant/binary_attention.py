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

    Without gradients q, k, v and b are packed, the scores are products of bits and no exponential is taken: the result is
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
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def _inference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, beta: float, surrogate: str, binary_values: bool
) -> Tensor:
    def signs(t: Tensor) -> BitTensor:
        return binarize(t, surrogate, packed=True)  # type: ignore[return-value]

    scores = _masked(_products(signs(q), signs(k)).to(q.dtype) * scale, mask)
    if not binary_values:
        return softmax_aware_binarize(scores, beta) @ v  # type: ignore[operator]
    seen = softmax_aware_binarize(scores, beta, packed=True)
    return _products(seen, signs(v.transpose(-1, -2))).to(v.dtype)  # type: ignore[arg-type]


def _products(a: BitTensor, b: BitTensor) -> Tensor:
    """a bᵀ, int32 [..., M, N], of every pair of matrices in two batches."""
    lead, (m, n) = a.shape[:-2], (a.shape[-2], b.shape[-2])
    pairs = zip(_matrices(a), _matrices(b), strict=True)
    found = [bgemm(x, y) for x, y in pairs]
    return torch.stack(found).reshape(*lead, m, n) if found else a.popcounts.new_zeros((*lead, m, n))  # type: ignore[arg-type]


def _matrices(bits: BitTensor) -> list[BitTensor]:
    """The matrices of a batch."""
    planes, popcounts = bits.planes, bits.popcounts
    if planes.dim() == 3:
        return [bits]
    batch = zip(planes.flatten(1, -3).unbind(1), popcounts.flatten(1, -2).unbind(1), strict=True)
    return [bits._replace(planes=p, popcounts=c) for p, c in batch]
