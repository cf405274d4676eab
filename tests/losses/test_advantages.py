"""KL estimates, group advantages and aggregation: each against its definition."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloss import losses
from token_problem import ADVANTAGE, MASK, B, T, policies


def test_kl_estimates() -> None:
    logp, old, ref = policies(torch.float64)
    p, q, r = logp.exp(), ref.exp(), (logp.exp() / old.exp())
    k3 = q / p - 1 - torch.log(q / p)
    for got, want in (
        (losses.kl_k1(logp, ref), torch.log(p / q)),
        (losses.kl_k2(logp, ref), 0.5 * torch.log(p / q) ** 2),
        (losses.kl_k3(logp, ref), k3),
        (losses.kl_low_var(logp, ref), k3),
        (losses.kl_corrected_k3(logp, ref, old), torch.where(r < 2, r, 2.0) * k3),
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_kl_far_from_the_reference() -> None:
    """k3 keeps growing and pulls back, on both sides; low_var holds at 10; small differences keep their digits."""
    x = torch.tensor([25.0, 100.0, 1e4, -1e4])  # reference - policy
    logp = torch.zeros(4, requires_grad=True)
    value = losses.kl_k3(logp, x)
    (grad,) = torch.autograd.grad(value.sum(), logp)
    assert value.isfinite().all() and (value[1:3] > value[:2]).all()
    torch.testing.assert_close(value[:3], (math.exp(20) * (x[:3].double() - 19) - 1 - x[:3]).float())
    torch.testing.assert_close(grad, torch.tensor([1 - math.exp(20)] * 3 + [1.0]))
    assert torch.equal(losses.kl_low_var(logp, x).detach(), torch.full((4,), 10.0))
    torch.testing.assert_close(losses.kl_k3(torch.zeros(1), torch.tensor([1e-3])).item(), 5.00167e-7, rtol=1e-3, atol=0)


def grouped(function: Callable[[list[float]], list[float]], rewards: Tensor, groups: list[int]) -> Tensor:
    out = [0.0] * len(groups)
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        for i, value in zip(members, function([float(rewards[i]) for i in members]), strict=True):
            out[i] = value
    return torch.tensor(out, dtype=rewards.dtype)


def by_definition(name: str, r: list[float], **o: Any) -> list[float]:
    if len(r) == 1:
        scaled = o.get("scale", name == "group_relative")
        return [r[0] / (1 + 1e-6) if scaled else r[0]]
    mean = statistics.mean(r)
    if name == "group_relative":
        return [(x - mean) / (statistics.stdev(r) + 1e-6) if o.get("scale", True) else x - mean for x in r]
    if name == "rec_advantage":
        return [(x - mean) / (statistics.pstdev(r) + 1e-6) if o.get("scale") else x - mean for x in r]
    if name == "asymre_advantage":
        return [x - (mean + o.get("shift", -0.1)) for x in r]
    tau = o.get("tau", 1.0)
    soft = tau * math.log(sum(math.exp(x / tau) for x in r) / len(r))
    return [x - (soft if "baseline" in o else mean) for x in r]


@pytest.mark.parametrize(
    ("name", "o"),
    [
        ("group_relative", {}), ("group_relative", {"scale": False}), ("rec_advantage", {}),
        ("rec_advantage", {"scale": True}), ("asymre_advantage", {}), ("asymre_advantage", {"shift": -0.5}),
        ("opmd_advantage", {}), ("opmd_advantage", {"baseline": "logavgexp", "tau": 0.7}),
        ("opmd_advantage", {"baseline": "lse"}),
    ],
)  # fmt: skip
def test_advantages(name: str, o: dict[str, Any]) -> None:
    groups = [7, 3, 7, 7, -2, 3, 3, 9, 9]  # -2 alone; 9 all alike
    rewards = torch.randn(9, dtype=torch.float64)
    rewards[7:] = 1.0
    got = getattr(losses, name)(rewards, torch.tensor(groups), **o)
    want = grouped(lambda r: by_definition(name, r, **o), rewards, groups)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    same = getattr(losses, name)(rewards, 3, **o)
    torch.testing.assert_close(same, getattr(losses, name)(rewards, torch.arange(9) // 3, **o))
    assert getattr(losses, name)(1e4 * rewards.float(), 3, **o).isfinite().all()


def test_aggregation() -> None:
    values = torch.randn(B, T, dtype=torch.float64)
    mask = MASK.clone()
    mask[1] = False  # a sequence without tokens is no sequence
    sums = [float(values[b][mask[b]].sum()) for b in (0, 2, 3)]
    lengths = [int(mask[b].sum()) for b in (0, 2, 3)]
    want = {
        "token-mean": sum(sums) / sum(lengths),
        "seq-mean-token-sum": sum(sums) / 3,
        "seq-mean-token-mean": sum(s / n for s, n in zip(sums, lengths, strict=True)) / 3,
        "seq-sum": sum(sums),
    }
    for mode, value in want.items():
        assert float(losses.aggregate(values, mask, mode)) == pytest.approx(value, rel=1e-12)
        empty = losses.aggregate(values * torch.nan, torch.zeros_like(mask), mode)
        assert empty == 0
    assert torch.equal(losses.aggregate(values, mask, "none"), torch.where(mask, values, 0.0))
    halves = [losses.aggregate(values[i : i + 2], mask[i : i + 2], denominator=mask.sum()) for i in (0, 2)]
    torch.testing.assert_close(sum(halves), losses.aggregate(values, mask))
    torch.testing.assert_close(
        losses.token_entropy_bonus(values, 0.2, mask=mask), -0.2 * losses.aggregate(values, mask)
    )


def test_shapes_of_any_rank() -> None:
    """[prompts, samples, T] with advantages [prompts, samples] is the flattened batch."""
    logp, old, _ = policies()
    want = losses.gspo(logp, old, ADVANTAGE, mask=MASK, clip_low=1.0, clip_high=1.0)
    shape = (2, 2, T)
    got = losses.gspo(
        logp.reshape(shape), old.reshape(shape), ADVANTAGE.reshape(2, 2), mask=MASK.reshape(shape), clip_low=1.0,
        clip_high=1.0,
    )  # fmt: skip
    assert torch.equal(got, want)


@pytest.mark.parametrize("reward, size", [(0.7, 7), (1.1, 11), (100.1, 9)])
def test_equal_rewards_have_no_advantage(reward: float, size: int) -> None:
    """In float32 their mean is not the reward; a deviation of rounding errors would make advantages of up to 1 of it."""
    rewards = torch.full((size,), reward)
    assert (losses.group_relative(rewards, size) == 0).all()
    assert (losses.rec_advantage(rewards, size, scale=True) == 0).all()
    assert (losses.opmd_advantage(rewards, size) == 0).all()
