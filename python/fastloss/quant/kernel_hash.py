"""Kernelized hashing: binary codes whose products follow a Gaussian kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .binarize import binarize
from .bit_tensor import BitTensor
from .ops import wide


def squared_distances(x: Tensor, anchors: Tensor) -> Tensor:
    """|x_i - a_j|^2 as |x|^2 + |a|^2 - 2 <x, a>, at least 0: x [..., N, D], anchors [..., m, D] -> [..., N, m]."""
    norms = x.square().sum(-1, keepdim=True) + anchors.square().sum(-1)[..., None, :]
    return (norms - 2 * (x @ anchors.mT)).clamp(min=0)


def _bandwidth(sigma: Tensor | float, like: Tensor) -> Tensor:
    """As [B or 1, H or 1, 1, 1]."""
    size = torch.as_tensor(sigma, dtype=like.dtype, device=like.device)
    batch, heads = like.shape[:2]
    if size.dim() > 2 or any(
        s not in (1, wanted) for s, wanted in zip(reversed(size.shape), (heads, batch), strict=False)
    ):
        raise ValueError(f"bandwidth must be one number, [{heads}] or [{batch}, {heads}], got {list(size.shape)}")
    return size[..., None, None]


def gaussian_kernel(x: Tensor, anchors: Tensor, bandwidth: Tensor | float | None, normalize: bool) -> Tensor:
    """exp(-|x_i - a_j|^2 / (2 sigma)) [B, H, N, m], in float32 (float64 of float64)."""
    x, anchors = x.to(wide(x)), anchors.to(wide(x))
    if normalize:
        x = torch.nn.functional.normalize(x, dim=-1)
    distances = squared_distances(x, anchors)
    sigma = distances.mean((-2, -1), keepdim=True) if bandwidth is None else _bandwidth(bandwidth, distances)
    # Where all tokens are the anchor, the distances and their mean are 0 and the kernel is 1.
    return torch.exp(-distances / (2 * sigma).clamp(min=torch.finfo(sigma.dtype).tiny))


def check_tokens(x: Tensor, anchors: Tensor) -> None:
    """Raise TypeError or ValueError unless x is [B, H, N, D] and anchors [H, m, D] or [m, D]."""
    for name, t in (("x", x), ("anchors", anchors)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            given = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} must be a floating tensor, got {given}")
    if x.device != anchors.device:
        raise ValueError(f"x and anchors must be on one device, got {x.device} and {anchors.device}")
    shapes = f"{list(x.shape)} and {list(anchors.shape)}"
    if x.dim() != 4 or anchors.dim() not in (2, 3) or anchors.shape[-1] != x.shape[-1]:
        raise ValueError(f"x and anchors must be [B, H, N, D] and [H, m, D] or [m, D], got {shapes}")
    if (anchors.dim() == 3 and anchors.shape[0] != x.shape[1]) or not anchors.shape[-2]:
        raise ValueError(f"anchors must be of {x.shape[1]} heads, at least one a head, got {shapes}")


def kernel_hash(
    x: Tensor, anchors: Tensor, projection: Tensor, mean: Tensor, *, bandwidth: Tensor | float | None = None,
    normalize: bool = True, packed: bool = False,
) -> Tensor | BitTensor:  # fmt: skip
    """code_r(x) = sign(sum_j projection_rj (kappa_j(x) - mean_j)), kappa_j(x) = exp(-|x - anchor_j|^2 / (2 sigma)).

    Args:
        x: [B, H, N, D]: what serves as query and as key; float32, float16, bfloat16, float64. Computed in float32 at
            least, also under autocast.
        anchors: [H, m, D], or [m, D] for all heads.
        projection: [H, bits, m]; mean: [H, m]; of `learn_hash`.
        bandwidth: sigma, one number, [H] or [B, H]. None: the mean of |x_i - anchor_j|^2 over the tokens and anchors of
            each (batch, head), through which the gradient flows too.
        normalize: x / |x| first, token by token, as the paper has it.
        packed: codes as a BitTensor, without a gradient.

    Returns:
        codes [B, H, N, bits] of -1 and +1 in the dtype of x; sign(0) = +1. The gradient is that of clip: slope 1 where the
        sum is less than 1 in magnitude, else 0. The distances are |x|^2 + |a|^2 - 2 <x, a>: nothing of [B, H, N, m, D].

    "EcoFormer: Energy-Saving Attention with Linear Complexity". Raises ValueError and TypeError.
    """
    check_tokens(x, anchors)
    heads, many = x.shape[1], anchors.shape[-2]
    if projection.dim() != 3 or projection.shape[0] != heads or projection.shape[2] != many or not projection.shape[1]:
        raise ValueError(f"projection must be [{heads}, bits, {many}], got {list(projection.shape)}")
    if tuple(mean.shape) != (heads, many):
        raise ValueError(f"mean must be [{heads}, {many}], got {list(mean.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        kappa = gaussian_kernel(x, anchors, bandwidth, normalize)
        centred = kappa - mean.to(kappa)[:, None]
        codes = binarize(centred @ projection.to(kappa).mT, "clip", packed=packed)
    return codes.to(x.dtype) if isinstance(codes, Tensor) else codes
