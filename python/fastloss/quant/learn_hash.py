"""The greedy learning of the projection of `kernel_hash`."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernel_hash import check_tokens, gaussian_kernel


def similarity_labels(x: Tensor, topk: int) -> Tensor:
    """[B, H, N, N]: +1 at the `topk` largest <x_i, x_j> of each i, -1 at the `topk` smallest, else 0."""
    products = x @ x.mT
    labels = torch.zeros_like(products)
    labels.scatter_(-1, products.topk(topk, -1, largest=False).indices, -1.0)
    return labels.scatter_(-1, products.topk(topk, -1).indices, 1.0)


def _agreement(y: Tensor, labels: Tensor) -> Tensor:
    """yᵀ S y of each (batch, head), summed over the batch: [H]."""
    return (y * (labels @ y[..., None])[..., 0]).sum((0, 2))


def _signs(kappa: Tensor, weight: Tensor) -> Tensor:
    u = torch.einsum("bhnm,hm->bhn", kappa, weight)
    return torch.where(u >= 0, 1.0, -1.0).to(u.dtype)


def _descend(
    kappa: Tensor, labels: Tensor, weight: Tensor, scale: float, steps: int, rate: float, momentum: float
) -> Tensor:
    """SGD with Nesterov's momentum on -scale sum of yᵀ S y, y = 2 sigmoid(u) - 1 = tanh(u / 2): one weight [H, m]."""
    both, velocity = labels + labels.mT, torch.zeros_like(weight)
    for _ in range(steps):
        y = torch.tanh(torch.einsum("bhnm,hm->bhn", kappa, weight) / 2)
        dy = -scale * (both @ y[..., None])[..., 0]
        gradient = torch.einsum("bhnm,bhn->hm", kappa, dy * (1 - y * y) / 2)
        velocity = momentum * velocity + gradient
        weight = weight - rate * (gradient + momentum * velocity)
    return weight


@torch.no_grad()
def learn_hash(
    x: Tensor, anchors: Tensor, *, bits: int = 16, topk: int = 10, steps: int = 100, learning_rate: float = 5e-4,
    momentum: float = 0.9, bandwidth: Tensor | float | None = None, normalize: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The projection and the mean of `kernel_hash`, so that products of codes tell near tokens from far ones.

    mean = the mean of kappa over tokens and batch. Labels S: `bits` at the topk largest <x_i, x_j> of each i, -`bits` at
    the topk smallest, else 0. Bit after bit, a random weight takes `steps` steps of SGD (Nesterov) on

        -mean over batch and heads of yᵀ S y / (N bits),    y = 2 sigmoid(weight . (kappa - mean)) - 1,

    is kept in each head where signs agree better with S than those of the random weight, and S becomes S - y yᵀ of the
    signs, so that the next bit learns what is left.

    Args:
        x: [B, H, N, D], tokens of training data; anchors: [H, m, D] or [m, D], of them usually. S has [B, H, N, N] numbers.
        bits, topk, steps, learning_rate, momentum: the paper's.
        bandwidth, normalize: as of `kernel_hash`.
        generator: of the random weights.

    Returns:
        (projection [H, bits, m], mean [H, m]), float32 (float64 of float64). "EcoFormer: Energy-Saving Attention with
        Linear Complexity". Raises ValueError and TypeError.
    """
    check_tokens(x, anchors)
    batch, heads, tokens, _ = x.shape
    if not batch or not 1 <= topk <= tokens // 2:
        raise ValueError(
            f"topk must be 1 to half of the tokens of a batch of at least 1, got {topk} of {list(x.shape)}"
        )
    if bits < 1 or steps < 0:
        raise ValueError(f"bits must be at least 1 and steps at least 0, got {bits} and {steps}")
    with torch.autocast(x.device.type, enabled=False):
        kappa = gaussian_kernel(x, anchors, bandwidth, normalize)
        mean = kappa.mean((0, 2))
        kappa = kappa - mean[:, None]
        units = x.to(kappa)
        units = torch.nn.functional.normalize(units, dim=-1) if normalize else units
        labels = bits * similarity_labels(units, topk)
        scale = 1 / (tokens * bits * batch * heads)
        chosen = []
        for _ in range(bits):
            start = torch.randn(heads, kappa.shape[-1], generator=generator, dtype=kappa.dtype, device=kappa.device)
            moved = _descend(kappa, labels, start, scale, steps, learning_rate, momentum)
            better = _agreement(_signs(kappa, moved), labels) > _agreement(_signs(kappa, start), labels)
            chosen.append(torch.where(better[:, None], moved, start))
            y = _signs(kappa, chosen[-1])
            labels = labels - y[..., :, None] * y[..., None, :]
    return torch.stack(chosen, 1), mean
