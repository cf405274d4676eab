"""Advantages from the rewards of a group of samples of one prompt: what policy losses multiply log-probabilities with."""

from __future__ import annotations

import torch
from torch import Tensor

from . import catalogue

_SOURCE = (
    "Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm: Demystifying Some Myths About GRPO and Its Friends; "
    "modelscope/Trinity-RFT trinity/algorithm/advantage_fn/{}_advantage.py"
)


def _groups(rewards: Tensor, groups: Tensor | int) -> tuple[Tensor, Tensor]:
    """(group [N] of each sample as 0 .. G - 1, size [G] of each group in the dtype of the rewards).

    An int is the size of every group, consecutive samples; ids may be any integers (finding them waits for the device).
    """
    if rewards.dim() != 1 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating, [N], got {rewards.dtype} {tuple(rewards.shape)}")
    if isinstance(groups, int):
        if groups < 1 or rewards.shape[0] % groups:
            raise ValueError(f"{rewards.shape[0]} rewards do not fall into groups of {groups}")
        index = torch.arange(rewards.shape[0], device=rewards.device) // groups
        return index, rewards.new_full((rewards.shape[0] // groups,), float(groups))
    if groups.shape != rewards.shape or groups.is_floating_point():
        raise ValueError(
            f"groups must hold integer ids {tuple(rewards.shape)}, got {groups.dtype} {tuple(groups.shape)}"
        )
    _, index, size = torch.unique(groups, return_inverse=True, return_counts=True)
    return index, size.to(rewards.dtype)


def _prepared(rewards: Tensor) -> Tensor:
    rewards = rewards.detach()
    return rewards if rewards.dtype == torch.float64 else rewards.float()


def _mean(values: Tensor, index: Tensor, size: Tensor) -> Tensor:
    return size.new_zeros(size.shape).index_add(0, index, values) / size


def _centred(rewards: Tensor, index: Tensor, size: Tensor) -> Tensor:
    """r - mean of each group; r where a group is one sample.

    Measured from the group's lowest reward, so that equal rewards give exactly 0: what rounding leaves of them otherwise,
    divided by a deviation that is rounding too, would be an advantage.
    """
    lowest = size.new_full(size.shape, torch.inf).scatter_reduce(0, index, rewards, "amin")
    above = rewards - lowest[index]
    return torch.where((size == 1)[index], rewards, above - _mean(above, index, size)[index])


@catalogue.entry(
    formula="(r - mean) / (std + 1e-6), std with n - 1; a group of one: mean 0, std 1",
    gradient="none: a constant",
    source="Shao et al., DeepSeekMath (2024), GRPO; Liu et al., Understanding R1-Zero-Like Training (2025), scale=False; "
    + _SOURCE.format("grpo"),
)
def group_relative(rewards: Tensor, groups: Tensor | int, *, scale: bool = True, epsilon: float = 1e-6) -> Tensor:
    """(r - mean) / (std + epsilon) within each group, [N]; GRPO's advantage, with scale=False r - mean: REINFORCE's.

    rewards: [N]. groups: ids [N] of any integers, or the size of every group where samples of one prompt are
    consecutive. The standard deviation is the unbiased one; a group of one has mean 0 and std 1, so that its sample
    keeps its reward.
    """
    index, size = _groups(rewards, groups)
    r = _prepared(rewards)
    size = size.to(r.dtype)
    centred = _centred(r, index, size)
    if not scale:
        return centred
    variance = _mean(centred**2, index, size) * size / (size - 1).clamp(min=1)
    std = torch.where(size == 1, 1.0, variance.sqrt())
    return centred / (std[index] + epsilon)


@catalogue.entry(
    formula='r - b; b = mean, or "logavgexp": tau (LSE(r / tau) - log n); a group of one: b = 0',
    gradient="none: a constant",
    source=_SOURCE.format("opmd"),
    published="tau scales the loss too, see `opmd`",
)
def opmd_advantage(rewards: Tensor, groups: Tensor | int, *, baseline: str = "mean", tau: float = 1.0) -> Tensor:
    """r - b within each group, [N]; b the mean, or with baseline="logavgexp" tau log mean e^(r / tau) ("lse" for short).

    Raises ValueError for another baseline, tau <= 0, and groups that do not fit the rewards.
    """
    if baseline not in ("mean", "logavgexp", "lse"):
        raise ValueError(f'baseline must be "mean" or "logavgexp" ("lse"), got {baseline!r}')
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    if baseline == "mean":
        return group_relative(rewards, groups, scale=False)
    index, size = _groups(rewards, groups)
    r = _prepared(rewards)
    size = size.to(r.dtype)
    top = r.new_full(size.shape, -torch.inf).scatter_reduce(0, index, r, "amax")
    value = top + tau * _mean(((r - top[index]) / tau).exp(), index, size).log()
    return r - torch.where(size == 1, 0.0, value)[index]


@catalogue.entry(
    formula="r - (mean + shift), shift = -0.1; a group of one: r",
    gradient="none: a constant",
    source="Arnal et al., Asymmetric REINFORCE for off-Policy Reinforcement Learning (2025); "
    + _SOURCE.format("asymre"),
)
def asymre_advantage(rewards: Tensor, groups: Tensor | int, *, shift: float = -0.1) -> Tensor:
    """r - (mean + shift) within each group, [N]: a baseline below the mean, so that good samples weigh more."""
    index, size = _groups(rewards, groups)
    centred = group_relative(rewards, groups, scale=False)
    return centred - torch.where(size == 1, 0.0, centred.new_full((), shift))[index]


@catalogue.entry(
    formula="r - mean, or with scale (r - mean) / (std + 1e-6), std with n; a group of one: mean 0, std 1",
    gradient="none: a constant",
    source=_SOURCE.format("rec"),
    published="a group of one raises NameError there; `drop` (of surplus bad samples, at random) is the data loader's",
)
def rec_advantage(rewards: Tensor, groups: Tensor | int, *, scale: bool = False, epsilon: float = 1e-6) -> Tensor:
    """r - mean within each group, [N]; scale divides by std + epsilon, the biased one (n, not n - 1)."""
    centred = group_relative(rewards, groups, scale=False)
    if not scale:
        return centred
    index, size = _groups(rewards, groups)
    size = size.to(centred.dtype)
    std = torch.where(size == 1, 1.0, _mean(centred**2, index, size).sqrt())
    return centred / (std[index] + epsilon)
