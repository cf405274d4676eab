"""Layers grouped into blocks by the entropy of their activations (Q-VLM)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def activation_entropy(x: Tensor) -> Tensor:
    """- mean over rows of sum_j p_j log p_j, p = |x| / sum |x| along the last dimension: a tensor [].

    A row of zeros has entropy 0. In float32 (float64 for float64). ValueError for what is empty or not floating.
    Source: "Q-VLM: Post-training Quantization for Large Vision-Language Models".
    """
    if not x.is_floating_point() or not x.dim() or not x.numel():
        raise ValueError(f"x must be floating [..., D] and hold numbers, got {x.dtype} {list(x.shape)}")
    size = x.to(torch.promote_types(x.dtype, torch.float32)).abs()
    total = size.sum(-1, keepdim=True)
    p = torch.where(total > 0, size / total, 0.0)
    return -torch.xlogy(p, p).sum(-1).mean()


def partition_blocks(entropies: Sequence[float] | Tensor, period: int = 3) -> list[range]:
    """Layers 0 .. n - 1 as consecutive blocks, in each of which the quantisers are searched together.

    Layer i begins a block where its entropy is at least the mean of the entropies of layers 0 .. i (a large entropy goes
    with a large dependence of the layers behind it), or where i mod period == 1; layer 0 begins the first. period 0: by
    entropy alone. The released code's running mean is read so.

    Raises ValueError without layers, for NaN, and for period < 0. Source: "Q-VLM: Post-training Quantization for Large
    Vision-Language Models".
    """
    values = [float(e) for e in entropies]
    if not values or any(e != e for e in values):
        raise ValueError(f"entropies must list a number for each layer, got {values}")
    if period < 0:
        raise ValueError(f"period must be >= 0, got {period}")
    starts, total = [0], 0.0
    for i, e in enumerate(values):
        total += e
        if i and (e >= total / (i + 1) or (period and i % period == 1)):
            starts.append(i)
    return [range(a, b) for a, b in zip(starts, starts[1:] + [len(values)], strict=True)]
