"""From one loss per sample to one loss per batch: reweighting by loss, robust reductions, responses of bags."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import catalogue

_STRATEGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "linupper": lambda h: (h + 1).clamp(max=1),
    "quadratic": lambda h: 1 - h * h,
    "upper": lambda h: 0.5 * h + 0.5,
    "extremes": torch.abs,
}


def _vector(losses: Tensor) -> Tensor:
    if losses.dim() != 1 or not len(losses):
        raise ValueError(f"takes one loss per sample, shape [N] with N > 0, got {tuple(losses.shape)}")
    return losses


@catalogue.entry(
    formula="sum_i w_i l_i, w = softmax(f(h_i) / r) detached, h = 2 (l - min) / (max - min) - 1",
    gradient="w_i dl_i",
    source="Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining",
    published="0 / 0 where all losses are equal; here uniform weights",
)
def loss_reweighted(losses: Tensor, *, strategy: str = "linupper", r: float = 0.4) -> Tensor:
    """The batch's loss from losses [N] of its samples, weighted by their size. r = 0.4; uniform during a warm-up (r = inf).

    strategy: "linupper" min(h + 1, 1), "quadratic" 1 - h^2, "upper" (h + 1) / 2, "extremes" |h|.

    Raises ValueError for losses that are not [N], N > 0, another strategy and r <= 0.
    """
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(_STRATEGIES)}, got {strategy!r}")
    if not r > 0:
        raise ValueError(f"r must be > 0, got {r}")
    detached = _vector(losses).detach()
    low, high = detached.amin(), detached.amax()
    spread = high - low
    h = torch.where(spread > 0, 2 * (detached - low) / torch.where(spread > 0, spread, 1.0) - 1, 0.0)
    return (torch.softmax(_STRATEGIES[strategy](h) / r, 0) * losses).sum()


@catalogue.entry(
    formula="max_w sum_i w_i l_i - r sum_i w_i log(n w_i) = r (LSE(l / r) - log n)",
    gradient="softmax(l / r)_i dl_i",
    source="Doubly Robust Instance-Reweighted Adversarial Training",
)
def kl_dro(losses: Tensor, *, r: float = 1.0) -> Tensor:
    """The worst reweighting of losses [N] within a KL ball: between their mean (r -> inf) and their maximum (r -> 0).

    Raises ValueError for losses that are not [N], N > 0, and r <= 0.
    """
    if not r > 0:
        raise ValueError(f"r must be > 0, got {r}")
    n = len(_vector(losses))
    top = losses.detach().amax()  # a constant: it falls out of the sum
    below = (losses - top) / r
    # log of a mean near 1, for a large r: log sum - log n would leave no digit of it
    near = torch.expm1(below).mean()
    spread = torch.where(near > -0.5, torch.log1p(near.clamp(min=-0.5)), below.logsumexp(0) - math.log(n))
    return top + r * spread


@catalogue.entry(
    formula="mean of the ceil(fraction N) largest losses",
    gradient="dl_i / k on the largest, 0 elsewhere",
    source="Can we learn better with hard samples?",
)
def hard_fraction(losses: Tensor, *, fraction: float = 0.5) -> Tensor:
    """The mean over the hardest fraction of losses [N].

    Raises ValueError for losses that are not [N], N > 0, and a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    k = max(1, math.ceil(round(fraction * len(_vector(losses)), 9)))  # 0.07 * 100 is 7.000000000000001
    return losses.topk(k).values.mean()


def bag_mean(x: Tensor, bags: Tensor, count: int) -> Tensor:
    """Means of x [N, ...] over the bags [N] (ids 0..count-1): [count, ...]; 0 for an empty bag."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))  # a sum or a count in 16 bits stops growing
    total = exact.new_zeros(count, *x.shape[1:]).index_add(0, bags, exact)
    size = torch.bincount(bags, minlength=count).clamp(min=1).to(exact.dtype)
    return (total / size.reshape(-1, *(1,) * (x.dim() - 1))).to(x.dtype)


@catalogue.entry(
    formula="bag: mean_b l(mean_{i in b} f_i, ybar_b); instance: mean_i l(f_i, ybar_b(i)); (1 - rho) bag + rho instance",
    gradient="by autograd of l",
    source="Learning from Aggregate responses: Instance Level versus Bag Level Loss Functions",
)
def aggregate_response(
    loss: Callable[[Tensor, Tensor], Tensor], predictions: Tensor, responses: Tensor, bags: Tensor, *, rho: float = 0.5
) -> Tensor:
    """A loss l(f, y) -> [..] when only the mean response of each bag is known.

    predictions [N, ...], responses [B, ...] (the bags' means), bags [N] ids. rho 0: bag level, 1: instance level,
    between: the interpolation that regularises the instance level towards the bag's.

    Raises ValueError for rho outside [0, 1].
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must be in [0, 1], got {rho}")
    total = predictions.new_zeros(())
    if rho < 1:
        total = total + (1 - rho) * loss(bag_mean(predictions, bags, len(responses)), responses).mean()
    if rho > 0:
        total = total + rho * loss(predictions, responses[bags]).mean()
    return total


@catalogue.entry(
    formula="(1/M) sum_m l(dropout_m(h) W^T, y)",
    gradient="the mean of the masked heads' gradients",
    source="Multi-Sample Dropout for Accelerated Training and Better Generalization",
)
def multi_sample_dropout(
    loss: Callable[[Tensor, Tensor], Tensor], input: Tensor, target: Tensor, *, samples: int = 8, p: float = 0.5
) -> Tensor:
    """The mean loss of `samples` dropout masks on the features [N, D] that share one head and one label.

    loss(features, target) with a mean reduction, e.g. lambda h, y: linear_cross_entropy(h, weight, y): all masks are
    rows of one call, so the head's weight is read once a chunk and no logits are stored.

    Raises ValueError for samples < 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    rows = torch.nn.functional.dropout(input.repeat(samples, *(1,) * (input.dim() - 1)), p)
    return loss(rows, target.repeat(samples, *(1,) * (target.dim() - 1)))
