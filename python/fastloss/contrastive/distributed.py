"""A batch that is spread over ranks: the keys of all of them, with their gradients.

Rank r of W holds b rows, which are rows r b to r b + b - 1 of the whole batch. A loss of its own rows against the keys
of all ranks costs b W similarities a row, and its positives lie on `Diagonal(r b)`.

The gradient contract: each rank's loss is the mean over its own rows, and the gradient of a key is *summed* over the
ranks that used it. So the gradient of an embedding is W times that of the mean over the whole batch, and the mean over
ranks that DistributedDataParallel takes of the gradients of parameters makes it exactly that of one process with the
whole batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # a torch.distributed.ProcessGroup, None for all ranks


class Place(NamedTuple):
    """Where this process stands in a group."""

    rank: int
    world_size: int


def place(group: Group = None) -> Place:
    """(rank, world size), (0, 1) where torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return Place(0, 1)
    return Place(dist.get_rank(group), dist.get_world_size(group))


def check_place(rank: int, world_size: int, group: Group = None) -> None:
    """Raise ValueError where a caller's rank and world size are not those of the process group, RuntimeError without
    one."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got rank={rank} and world_size={world_size}")
    if world_size > 1:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(f"world_size={world_size} needs torch.distributed.init_process_group")
        if (rank, world_size) != place(group):
            raise ValueError(
                f"rank={rank} and world_size={world_size} do not agree with the process group: {place(group)}"
            )


def _check_even(x: Tensor, group: Group) -> None:
    """Raise ValueError, on all ranks, where the ranks hold different numbers of rows. Only seen on a CPU: elsewhere it
    would wait for the device."""
    if x.device.type != "cpu":
        return
    sizes = torch.empty(place(group).world_size, dtype=torch.int64)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(x)]), group=group)
    if bool((sizes != len(x)).any()):
        raise ValueError(f"all ranks must hold equally many rows (drop_last=True), got {sizes.tolist()}")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        whole = x.new_empty((place(group).world_size * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumScatter.apply(grad, ctx.group), None


class _SumScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group = group
        own = whole.new_empty((whole.shape[0] // place(group).world_size, *whole.shape[1:]))
        dist.reduce_scatter_tensor(own, whole.contiguous(), group=group)
        return own

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad, ctx.group), None


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _mean(grad, ctx.group), None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _mean(x: Tensor, group: Group) -> Tensor:
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total / place(group).world_size


def gather_keys(x: Tensor, group: Group = None, *, gradient: bool = True) -> Tensor:
    """x [b, ...] of every rank, one after another: [W b, ...]; x itself in a single process.

    The backward sums the gradient of each rank's rows over all ranks (a reduce-scatter); with `gradient=False` nothing
    flows back. All ranks must call it, in the same order, and so must their backwards. Raises ValueError, on a CPU,
    where the ranks hold different numbers of rows.
    """
    if place(group).world_size == 1:
        return x if gradient else x.detach()
    _check_even(x, group)
    return _Gather.apply(x if gradient else x.detach(), group)


def mean_over_ranks(loss: Tensor, group: Group = None) -> Tensor:
    """The mean of the ranks' losses, with the gradient of this rank's own."""
    if place(group).world_size == 1:
        return loss
    return loss + (_mean(loss, group) - loss).detach()


def mean_gradient(x: Tensor, group: Group = None) -> Tensor:
    """x, whose gradient is averaged over the ranks: a parameter that all share, before DistributedDataParallel sees
    it."""
    if place(group).world_size == 1 or not x.requires_grad:
        return x
    return _MeanGradient.apply(x, group)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by `factor`."""
    return x if factor == 1 else _ScaledGradient.apply(x, factor)
