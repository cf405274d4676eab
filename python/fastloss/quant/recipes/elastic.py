"""Elastic quantisation: one network for many bit widths, and the losses that train it (EQ-Net)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ... import terms
from ...engine import row_stats
from ...functional import cross_entropy
from ...wide import WideRowStats
from ..fake_quant import fake_quant
from .step_search import search_step

_SOURCE_BITS = (2, 3, 4, 5, 6, 7, 8)


class ElasticSetting(NamedTuple):
    """One quantiser of an elastic network."""

    bits: int
    symmetric: bool = True
    per_channel: bool = False


def sample_setting(
    bits: Sequence[int] = _SOURCE_BITS, *, symmetric: Sequence[bool] = (True, False),
    per_channel: Sequence[bool] = (True, False), generator: torch.Generator | None = None,
) -> ElasticSetting:  # fmt: skip
    """A setting drawn uniformly from what is listed. The highest and the lowest of a step of `guidance_losses` are those
    with max(bits) and min(bits)."""
    lists: tuple[Sequence, ...] = (bits, symmetric, per_channel)
    if not all(lists):
        raise ValueError(f"bits, symmetric and per_channel must each list a choice, got {lists}")
    where = generator.device if generator is not None else torch.device("cpu")
    at = [int(torch.randint(len(choices), (), generator=generator, device=where)) for choices in lists]
    return ElasticSetting(int(bits[at[0]]), bool(symmetric[at[1]]), bool(per_channel[at[2]]))


class ElasticQuantizer(nn.Module):
    """`fake_quant` with a step and an offset of its own for each width, with or without a zero offset, of the whole
    tensor or of each channel.

        x' = s round(clamp((x - beta) / s, Qn, Qp)) + beta,   s = |step|,   beta = 0 where symmetric

    Args:
        channels: how many; dim: where they are.
        bits: widths that there are parameters for.

    `start(x)` sets all of them by `search_step` (80 ranges, |.|^2.4). The gradient factor is LSQ's, 1 / sqrt(numbers that
    share a step * Qp); the released code has 2 in place of 1 for channels, counted along another dimension, which is left
    out. Source: "EQ-Net: Elastic Quantization Neural Networks".
    """

    def __init__(self, channels: int, dim: int = 0, bits: Sequence[int] = _SOURCE_BITS) -> None:
        super().__init__()
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels must be an integer >= 1, got {channels!r}")
        if not bits or len(set(bits)) < len(bits) or any(b != int(b) or not 2 <= b <= 16 for b in bits):
            raise ValueError(f"bits must list widths from 2 to 16, each once, got {tuple(bits)}")
        self.channels, self.dim, self.bits = channels, dim, tuple(int(b) for b in bits)
        self.steps, self.offsets = nn.ParameterDict(), nn.ParameterDict()
        for b in self.bits:
            for symmetric in (True, False):
                for per_channel in (True, False):
                    name, count = _name(ElasticSetting(b, symmetric, per_channel)), channels if per_channel else 1
                    self.steps[name] = nn.Parameter(torch.ones(count))
                    if not symmetric:
                        self.offsets[name] = nn.Parameter(torch.zeros(count))

    def _check(self, x: Tensor, setting: ElasticSetting) -> str:
        if setting.bits not in self.bits:
            raise ValueError(f"bits must be one of {self.bits}, got {setting.bits}")
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != self.channels:
            raise ValueError(f"x must have {self.channels} channels in dimension {self.dim}, got {list(x.shape)}")
        return _name(setting)

    def forward(self, x: Tensor, setting: ElasticSetting) -> Tensor:
        """x quantised as `setting` says; gradients in x, and in the step and offset of the setting."""
        name = self._check(x, setting)
        return fake_quant(
            x, self.steps[name].abs(), bits=setting.bits, offset=None if setting.symmetric else self.offsets[name],
            dim=self.dim if setting.per_channel else None,
        )  # fmt: skip

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Set every step and offset by what suits x."""
        for b in self.bits:
            for symmetric in (True, False):
                for per_channel in (True, False):
                    setting = ElasticSetting(b, symmetric, per_channel)
                    name = self._check(x, setting)
                    scale, offset = search_step(x, b, symmetric=symmetric, dim=self.dim if per_channel else None)
                    self.steps[name].copy_(scale)
                    if not symmetric:
                        self.offsets[name].copy_(offset)


def _name(setting: ElasticSetting) -> str:
    return f"{setting.bits}{'s' if setting.symmetric else 'a'}{'c' if setting.per_channel else 't'}"


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
