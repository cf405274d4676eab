"""Data parallel: every rank gets every rank's gradient, so that all take the same step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .factors import Gradient


def broadcast(tensor: Tensor, group: Any) -> None:
    """Rank 0's numbers to all ranks of the group."""
    dist.broadcast(tensor, dist.get_global_rank(group, 0), group)


def gather(gradient: Gradient, rates: tuple[float, ...], group: Any) -> tuple[Gradient, int]:
    """(the gradients of all ranks in the order of ranks, the number of ranks). The numbers of examples may differ.

    Raises RuntimeError on every rank if `rates` or the number of listed classes are not the same everywhere.
    """
    ranks = dist.get_world_size(group)
    examples, listed = gradient.classes.shape
    mine = torch.cat(
        (
            gradient.x, gradient.target_logit, gradient.sum[:, None], gradient.centred_sumsq[:, None],
            gradient.classes.to(torch.float64),
        ),
        1,
    )  # fmt: skip
    header = torch.tensor([examples, listed, *rates], dtype=torch.float64, device=mine.device)
    headers = [torch.empty_like(header) for _ in range(ranks)]
    dist.all_gather(headers, header, group)
    for rank, other in enumerate(headers):
        if not torch.equal(other[1:], header[1:]):
            raise RuntimeError(
                "ranks differ in (classes listed a row, lr, weight_decay, gradient_scale): "
                f"{header[1:].tolist()} here, {other[1:].tolist()} on rank {rank} of the group"
            )
    counts = [int(other[0]) for other in headers]
    padded = mine.new_zeros(max(counts), mine.shape[1])
    padded[:examples] = mine
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group)
    together = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    x, own, total, centred, ids = together.split([gradient.x.shape[1], listed, 1, 1, listed], 1)
    classes = ids.to(torch.int64)
    return Gradient(x.contiguous(), classes, own.contiguous(), total[:, 0], centred[:, 0]), ranks
