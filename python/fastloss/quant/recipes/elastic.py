"""What trains one network for many bit widths (EQ-Net): settings and losses. `ElasticQuantizer` has the steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ... import terms
from ...engine import row_stats
from ...functional import cross_entropy
from ...wide import WideRowStats

_SOURCE_BITS = (2, 3, 4, 5, 6, 7, 8)


class ElasticSetting(NamedTuple):
    """One quantiser of an elastic network: `ElasticQuantizer`(x, *setting)."""

    bits: int
    symmetric: bool = True
    granularity: str = "tensor"


def sample_setting(
    bits: Sequence[int] = _SOURCE_BITS, *, symmetric: Sequence[bool] = (True, False),
    granularity: Sequence[str] = ("tensor", "row"), generator: torch.Generator | None = None,
) -> ElasticSetting:  # fmt: skip
    """A setting drawn uniformly from what is listed. The highest and the lowest of a step of `guidance_losses` are those
    with max(bits) and min(bits)."""
    lists: tuple[Sequence, ...] = (bits, symmetric, granularity)
    if not all(lists):
        raise ValueError(f"bits, symmetric and granularity must each list a choice, got {lists}")
    where = generator.device if generator is not None else torch.device("cpu")
    at = [int(torch.randint(len(choices), (), generator=generator, device=where)) for choices in lists]
    return ElasticSetting(int(bits[at[0]]), bool(symmetric[at[1]]), str(granularity[at[2]]))


def weight_distribution_loss(
    weights: Iterable[Tensor], *, kurtosis: float = 1.8, kurtosis_weight: float = 0.015, skewness_weight: float = 1.0
) -> Tensor:
    """WDR: weights spread evenly and without a skew lose little at any width.

        mean over the weights of  kurtosis_weight (K - kurtosis)^2 + skewness_weight S^2
        K = E[((w - mean) / sigma)^4],   S = E[((w - mean) / sigma)^3],   sigma^2 = E[(w - mean)^2]

    1.8 is the kurtosis of a uniform distribution. The paper leaves the first layer out of `weights`. A weight that is
    constant has no K and S: NaN. ValueError without weights.
    Source: "EQ-Net: Elastic Quantization Neural Networks".
    """
    parts = []
    for w in weights:
        if not w.is_floating_point() or not w.numel():
            raise ValueError(f"weights must be floating and hold numbers, got {w.dtype} {list(w.shape)}")
        u = w.to(torch.promote_types(w.dtype, torch.float32)).flatten()
        u = u - u.mean()
        u = u / u.square().mean().sqrt()
        k, s = u.pow(4).mean(), u.pow(3).mean()
        parts.append(kurtosis_weight * (k - kurtosis).square() + skewness_weight * s.square())
    if not parts:
        raise ValueError("weights must list at least one tensor")
    return torch.stack(parts).mean()


class GuidanceLosses(NamedTuple):
    """One loss for each of the three settings of a step; their sum is trained."""

    high: Tensor
    sampled: Tensor
    low: Tensor


def guidance_losses(high: Tensor, sampled: Tensor, low: Tensor, target: Tensor) -> GuidanceLosses:
    """GPG: the widest network learns from the labels, a sampled one also from it, the narrowest also from the sampled one.

        L_high = CE(high);   L_sampled = (KL(high || sampled) + CE(sampled)) / 2;   L_low = (KL(sampled || low) + CE(low)) / 2
        KL(a || b) = mean over rows of sum_j softmax(a)_j (log softmax(a)_j - log softmax(b)_j), no gradient in a

    Args:
        high, sampled, low: logits [N, C] of the same rows under the settings max(bits), sampled and min(bits).
        target: int64 [N] in [0, C).

    Raises ValueError. Source: "EQ-Net: Elastic Quantization Neural Networks".
    """
    shapes = [list(t.shape) for t in (high, sampled, low)]
    if high.dim() != 2 or shapes[1:] != shapes[:1] * 2 or target.shape != high.shape[:1]:
        raise ValueError(f"logits must be three times [N, C] and target [N], got {shapes} and {list(target.shape)}")
    return GuidanceLosses(cross_entropy(high, target), _guided(sampled, high, target), _guided(low, sampled, target))


def _guided(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    stats = cast(WideRowStats, row_stats(student, target, teacher=teacher.detach(), term=terms.kl()))
    return (stats.term - stats.logp).mean() / 2
